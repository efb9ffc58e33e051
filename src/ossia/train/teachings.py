"""What a teacher said, and what else it would have said: samples with its likeliest tokens, in shards on the disk.

    FOLDER/
        teachings.json                  format, vocabulary, top, shard, teacher and what it was asked for
        train/shard-00000.safetensors   samples 0 to shard - 1, and so on
        held_out/shard-00000.safetensors

    in a shard of N samples with T tokens together, of which R were sampled, and K = top
        token_ids      I32 [T]      all tokens, sample after sample
        starts         I64 [N + 1]  where each sample begins
        sampled        U8  [T]      1 for tokens that the teacher sampled
        top_ids        I32 [R, K]   the teacher's likeliest tokens at the place of each sampled token, in order
        top_logprobs   F16 [R, K]   their log-probabilities
        efforts        U8  [N]      0 low, 1 medium, 2 high
        rewards        F32 [N]      what the task says of the sample

A shard is written beside its place and renamed, so that a shard that is there is whole. Collecting goes on with those
that are missing, or have fewer samples than are asked for now. Half precision keeps log-probabilities within 0.004
where they are above -8.

Shapes   as above.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ossia.errors import CheckpointError, ConfigError, InputError
from ossia.harmony import Effort, Tokenizer
from ossia.model.safetensors_file import DTYPES, TensorEntry, header_bytes, map_file, read_header
from ossia.train.data import Sample
from ossia.train.rollout import Rollout
from ossia.train.tasks import Split

_FORMAT = 1
_EFFORTS = tuple(Effort)
_DTYPES = {
    "token_ids": "I32",
    "starts": "I64",
    "sampled": "U8",
    "top_ids": "I32",
    "top_logprobs": "F16",
    "efforts": "U8",
    "rewards": "F32",
}


@dataclass(frozen=True)
class Manifest:
    """What all shards of a folder have in common; a folder is gone on with only as it was begun."""

    vocabulary: str
    top: int
    shard: int
    teacher: str
    # The tasks, efforts, seed and limits that the teacher's exercises come from.
    exercises: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Teaching:
    """One sample of a teacher."""

    token_ids_L: npt.NDArray[np.int32]
    sampled_L: npt.NDArray[np.bool_]
    top_ids_RK: npt.NDArray[np.int32]
    top_logprobs_RK: npt.NDArray[np.float32]
    effort: Effort
    reward: float

    def __len__(self) -> int:
        return len(self.token_ids_L)

    def sample(self) -> Sample:
        return Sample(self.token_ids_L, self.sampled_L.astype(np.float32), self.effort)


class Teachings:
    """A folder of teachings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def manifest(self) -> Manifest:
        """Raises InputError when there are none here, CheckpointError when their description is damaged."""
        path = self.folder / "teachings.json"
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            if said.pop("format") != _FORMAT:
                raise ValueError("written by another version of ossia")
            return Manifest(**said)
        except FileNotFoundError:
            raise InputError(f"{self.folder} holds no teachings; collect some first: give a teacher") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{path} cannot be used: {error}; remove {self.folder} and collect anew") from None

    def begin(self, manifest: Manifest) -> None:
        """Make the folder, or go on with it. Raises ConfigError where it holds teachings of another kind."""
        path = self.folder / "teachings.json"
        if path.exists():
            before, now = asdict(self.manifest), asdict(manifest)
            if other := [name for name in now if now[name] != before[name]]:
                was = "; ".join(f"{name} was {before[name]!r}, now {now[name]!r}" for name in other)
                raise ConfigError(f"{self.folder} holds other teachings: {was}. Give another folder as teachings")
            return
        for split in ("train", "held_out"):
            (self.folder / split).mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"format": _FORMAT, **asdict(manifest)}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def missing(self, split: Split, count: int, shard: int) -> Iterator[tuple[int, range]]:
        """(number of the shard, its samples) of the shards of ``count`` samples that are not there, or not to the end.

        Raises CheckpointError for a damaged shard.
        """
        for number, start in enumerate(range(0, count, shard)):
            samples = range(start, min(start + shard, count))
            if _num_samples(self._path(split, number)) < len(samples):
                yield number, samples

    def num_samples(self, split: Split) -> int:
        """Samples of a split that are there. Raises CheckpointError for a damaged shard."""
        return sum(map(_num_samples, self._shards(split)))

    def write(self, split: Split, number: int, rollouts: Sequence[Rollout]) -> None:
        """Write a shard, whole or not at all."""
        arrays: dict[str, npt.NDArray[Any]] = {
            "token_ids": np.concatenate([one.token_ids_L for one in rollouts]).astype(np.int32),
            "starts": np.cumsum([0, *(len(one.token_ids_L) for one in rollouts)]).astype(np.int64),
            "sampled": np.concatenate([one.sampled_L for one in rollouts]).astype(np.uint8),
            "top_ids": np.concatenate([one.top_ids_RK for one in rollouts if one.top_ids_RK is not None]),
            "top_logprobs": np.concatenate(
                [one.top_logprobs_RK for one in rollouts if one.top_logprobs_RK is not None]
            ).astype(np.float16),
            "efforts": np.array([_EFFORTS.index(one.draw.effort) for one in rollouts], np.uint8),
            "rewards": np.array([one.reward.value for one in rollouts], np.float32),
        }
        # Wider numbers first, so that all are aligned.
        ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))
        path = self._path(split, number)
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "wb") as file:
            file.write(header_bytes({name: (_DTYPES[name], array.shape) for name, array in ordered.items()}))
            for name, array in ordered.items():
                file.write(array.astype(DTYPES[_DTYPES[name]], copy=False).tobytes())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def read(self, split: Split, count: int | None = None) -> list[Teaching]:
        """The first ``count`` samples of a split, all if None; arrays are views of the mapped files, but for
        log-probabilities.

        Raises CheckpointError for a damaged shard.
        """
        top = self.manifest.top
        found: list[Teaching] = []
        for path in self._shards(split):
            if count is not None and len(found) >= count:
                break
            found += _read_shard(path, top)
        return found[:count]

    def _shards(self, split: Split) -> list[Path]:
        return sorted((self.folder / split).glob("shard-*.safetensors"))

    def _path(self, split: Split, number: int) -> Path:
        return self.folder / split / f"shard-{number:05}.safetensors"


def _num_samples(path: Path) -> int:
    """Samples of a shard; 0 where there is none."""
    entry = _open(path)[0].get("efforts") if path.exists() else None
    return entry.shape[0] if entry is not None else 0


def _read_shard(path: Path, top: int) -> list[Teaching]:
    entries, mapped = _open(path)
    arrays = {}
    for name, dtype in _DTYPES.items():
        entry = entries.get(name)
        if entry is None or entry.dtype != dtype:
            raise CheckpointError(f"{path} lacks {name} as {dtype}; remove it and collect it again")
        values = mapped[entry.offset : entry.offset + entry.size_bytes]
        arrays[name] = values.view(DTYPES[dtype]).reshape(entry.shape)
    if arrays["top_ids"].shape[1] != top:
        raise CheckpointError(f"{path} has {arrays['top_ids'].shape[1]} likeliest tokens, the others {top}; remove it")
    sampled = arrays["sampled"].astype(bool)
    rows = np.concatenate(([0], np.cumsum(sampled)))
    teachings = []
    for n, (start, end) in enumerate(zip(arrays["starts"][:-1], arrays["starts"][1:], strict=True)):
        own = slice(rows[start], rows[end])
        teachings.append(
            Teaching(
                arrays["token_ids"][start:end],
                sampled[start:end],
                arrays["top_ids"][own],
                arrays["top_logprobs"][own].astype(np.float32),
                _EFFORTS[arrays["efforts"][n]],
                float(arrays["rewards"][n]),
            )
        )
    return teachings


def _open(path: Path) -> tuple[dict[str, TensorEntry], npt.NDArray[np.uint8]]:
    """The tensors of a shard by name, and its bytes."""
    try:
        return read_header(path), map_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; remove it and collect it again") from None


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """A digest of all tokens by their ids, special ones by their names."""
    digest = hashlib.blake2b(digest_size=16)
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    for token_id in range(tokenizer.vocab_size):
        data = names[token_id].encode() if token_id in names else tokenizer.token_bytes(token_id)
        digest.update(b"%d %d %b\n" % (token_id in names, len(data), data))
    return digest.hexdigest()


def check_vocabulary(teacher: str, theirs: Tokenizer, student: Tokenizer) -> None:
    """Raise ConfigError where a teacher of that name has another vocabulary than the student."""
    if vocabulary_digest(theirs) != vocabulary_digest(student):
        raise other_vocabulary(teacher, _difference(theirs, student))


def other_vocabulary(teacher: str, difference: str) -> ConfigError:
    """The error for a teacher whose vocabulary differs, and how."""
    return ConfigError(
        f"the teacher {teacher} has another vocabulary than the student: {difference}. Probabilities are compared "
        "token by token; take a teacher with the student's vocabulary",
        param="teacher",
    )


def _difference(teacher: Tokenizer, student: Tokenizer) -> str:
    if teacher.vocab_size != student.vocab_size:
        return f"it has {teacher.vocab_size} tokens, the student {student.vocab_size}"
    for token_id in range(student.vocab_size):
        if teacher.token_bytes(token_id) != student.token_bytes(token_id):
            theirs, ours = teacher.token_bytes(token_id), student.token_bytes(token_id)
            return f"token {token_id} is {theirs!r} there and {ours!r} here"
    return "its special tokens are others"
