"""Write a checkpoint's files: which tensor goes where, whole or not at all, and never onto a disk that is too small."""

from __future__ import annotations

import glob
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy.typing as npt

from ossia.errors import InputError, UnavailableError
from ossia.model.safetensors_file import DTYPES, header_bytes

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Names to dtype and shape, in the order of a file."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

# As large as the published shards.
SHARD_BYTES = 5_000_000_000
# What a folder must hold to be taken for a checkpoint that may be replaced: a file, and what stands in it.
_MARKS = {"config.json": ("model_type", "gpt_oss"), "adapter_config.json": ("peft_type", "LORA")}
# And what it may hold besides: anything else may be somebody's work.
_PARTS = re.compile(
    r".*\.safetensors|.*\.safetensors\.index\.json|.*\.gguf|(generation|tokenizer|preprocessor)_config\.json"
    r"|tokenizer\.json|(special_tokens_map|added_tokens|vocab|dtypes)\.json|merges\.txt|chat_template\.(jinja|json)"
    r"|LICENSE(\.\w+)?|USAGE_POLICY|README\.md|\.gitattributes"
)


def plan_shards(tensors: Tensors, shard_bytes: int = SHARD_BYTES) -> dict[str, Tensors]:
    """Files by name, each of at most ``shard_bytes`` unless one tensor is larger."""
    shards: list[Tensors] = [{}]
    in_shard_bytes = 0
    for name, tensor in tensors.items():
        size = tensor_bytes(tensor)
        if shards[-1] and in_shard_bytes + size > shard_bytes:
            shards.append({})
            in_shard_bytes = 0
        shards[-1][name] = tensor
        in_shard_bytes += size
    # Wider dtypes first: every tensor is then aligned.
    aligned = [dict(sorted(shard.items(), key=lambda item: -DTYPES[item[1][0]].itemsize)) for shard in shards]
    if len(aligned) == 1:
        return {"model.safetensors": aligned[0]}
    return {f"model-{i:05}-of-{len(aligned):05}.safetensors": shard for i, shard in enumerate(aligned, 1)}


def tensor_bytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    """The bytes of a tensor of this dtype and shape in a safetensors file."""
    dtype, shape = tensor
    return math.prod(shape) * DTYPES[dtype].itemsize


@contextmanager
def new_path(out: Path, needed_bytes: int, *, replace: bool = False) -> Iterator[Path]:
    """A path beside ``out`` to make a folder or a file at; it is renamed to ``out`` when the block ends well.

    ``replace``: a checkpoint that is at ``out`` already is replaced, after the new one is complete. What a killed
    process left beside ``out`` is removed, or put back where it had just been moved away. Where ``out`` is a link, what
    it points to is made, on that disk. Raises InputError when something is there that may not be replaced,
    UnavailableError when the disk has less than ``needed_bytes``.
    """
    if out.name in ("", ".."):
        raise InputError(f"{out} names no new folder. Give the name of one, such as {out / 'new'}.")
    if out.is_symlink():
        out = Path(os.path.realpath(out))
    _mend(out)
    is_there = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if is_there and not replace:
        raise InputError(f"{out} is there already and not empty. Give a new name.")
    if is_there and not _may_be_replaced(out):
        raise InputError(f"{out} is there and is not a checkpoint alone, so it is not replaced. Give another name.")
    check_disk(out, needed_bytes)
    partial, old = (out.parent / f".{out.name}.{os.getpid()}.{what}" for what in ("partial", "old"))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync_small_files(partial)
        if is_there:
            out.rename(old)
        elif out.is_dir() and not partial.is_dir():
            out.rmdir()
        partial.replace(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    finally:
        for path in (partial, old):
            _remove(path)


def check_disk(out: Path, needed_bytes: int) -> None:
    """Raise UnavailableError when the disk that ``out`` would be on is too full."""
    parent = next(folder for folder in out.absolute().parents if folder.is_dir())
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        raise UnavailableError(
            f"{out} needs {needed_bytes / 2**30:.1f} GiB, {parent} has {free_bytes / 2**30:.1f} GiB free. Free some "
            "space or choose another disk."
        )


def write_safetensors(
    path: Path,
    tensors: Tensors,
    pieces: Callable[[str], Iterable[npt.NDArray[Any]]],
    written: Callable[[int], None] = lambda size_bytes: None,
) -> None:
    """A file of these tensors; ``pieces`` gives the parts of one that follow each other, ``written`` hears of each."""
    with open(path, "wb") as file:
        file.write(header_bytes(tensors))
        for name, tensor in tensors.items():
            size_bytes = write_pieces(file, pieces(name), written)
            assert size_bytes == tensor_bytes(tensor), f"{name}: {size_bytes} bytes, expected {tensor_bytes(tensor)}"
        sync(file)


def write_pieces(file: BinaryIO, pieces: Iterable[npt.NDArray[Any]], written: Callable[[int], None]) -> int:
    """Write arrays one after the other; their bytes in all."""
    size_bytes = 0
    for piece in pieces:
        file.write(piece.tobytes())
        size_bytes += piece.nbytes
        written(piece.nbytes)
    return size_bytes


def write_index(folder: Path, shards: Mapping[str, Tensors]) -> None:
    """The index of a checkpoint of several files; nothing for one of a single file."""
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, tensors in shards.items() for name in tensors}
        total_bytes = sum(tensor_bytes(tensor) for tensors in shards.values() for tensor in tensors.values())
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
        )


def write_json(path: Path, value: object) -> None:
    """A JSON file as the published ones look."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sync(file: BinaryIO) -> None:
    """Wait until a file is on the disk, so that its name never stands for a half of it."""
    file.flush()
    os.fsync(file.fileno())


def _sync_small_files(made: Path) -> None:
    """Weights are synced as they are written; without the rest, what a power cut leaves could not be read."""
    for path in made.glob("*.json") if made.is_dir() else ():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _mend(out: Path) -> None:
    for path in out.parent.glob(f".{glob.escape(out.name)}.*"):
        match = re.fullmatch(rf"\.{re.escape(out.name)}\.(\d+)\.(partial|old)", path.name)
        # Our own number was another's before: in a container each process may be the first.
        if match is None or (int(match[1]) != os.getpid() and _is_running(int(match[1]))):
            continue
        if match[2] == "old" and not out.exists():
            path.rename(out)
        else:
            _remove(path)


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _may_be_replaced(out: Path) -> bool:
    if out.is_file():
        return out.suffix in (".gguf", ".safetensors")
    names = [path.name for path in out.iterdir() if path.name not in _MARKS]
    if not all(_PARTS.fullmatch(name) and (out / name).is_file() for name in names):
        return False
    gguf_names = [name for name in names if name.endswith(".gguf")]
    return any(_is_marked(out / mark) for mark in _MARKS) or _is_one_model(gguf_names)


def _is_marked(path: Path) -> bool:
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    field, value = _MARKS[path.name]
    # The config.json of an original/ folder names no type.
    return isinstance(fields, dict) and (fields.get(field) == value or "experts_per_token" in fields)


def _is_one_model(gguf_names: list[str]) -> bool:
    return len({re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", name) for name in gguf_names}) == 1
