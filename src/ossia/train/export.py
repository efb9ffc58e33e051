"""Write what training made in the layouts that other programs read: Hugging Face MXFP4 or bf16, GGUF, PEFT's adapter.

    mxfp4     Hugging Face, experts in MXFP4 as published               a folder
    bf16      Hugging Face, everything in bfloat16                       a folder
    gguf      llama.cpp's file, experts in MXFP4, the rest Q8_0 or bf16  a .gguf file
    merged    the base's own files, whatever their layout: only what was trained is other than it was
    adapter   PEFT's folder: the adapter alone

A tensor that nothing touches, of the same form as in the base, is copied byte for byte; in the base's own layout the
whole file is, so that an export without a change has the base's hash. Tensors are written one expert or some rows at a
time, into a place beside the output, which appears when it is complete and not before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ossia.errors import CheckpointError, ConfigError, InputError, UnavailableError
from ossia.harmony.tokenizer import Tokenizer
from ossia.model.adapted import check_base_copies
from ossia.model.adapter import Adapter, read_adapter, write_adapter
from ossia.model.checkpoint_writer import (
    SHARD_BYTES,
    Progress,
    new_path,
    plan_shards,
    sync,
    tensor_bytes,
    write_index,
    write_json,
    write_pieces,
    write_safetensors,
)
from ossia.model.checkpoint_writer import (
    Tensors as Plan,
)
from ossia.model.config_file import RANDOM_WEIGHTS, generation_config, hugging_face_config, read_json
from ossia.model.gguf_file import QUANTISED_NAMES, tokenizer_document
from ossia.model.gguf_writer import gguf_bytes, gpt_oss_metadata, write_gguf
from ossia.model.layouts import BYTES, HF, HF_BF16, Gguf, Layout
from ossia.model.safetensors_file import TensorEntry
from ossia.model.weights import Checkpoint
from ossia.ops.mapped import give_back
from ossia.train.divergence import PROMPTS, Divergence, check_prompts, divergence
from ossia.train.merged import Merged, read_tensors
from ossia.train.tensors import Rounding, Tensors

Format = Literal["mxfp4", "bf16", "gguf", "merged", "adapter"]
DenseType = Literal["q8_0", "bf16"]
FORMATS: tuple[Format, ...] = get_args(Format)

# Small files that belong to a model, and say nothing of how its weights are written.
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "USAGE_POLICY",
)
# Those of them that a checkpoint has, with config.json, index and headers, stay below this.
_SIDE_FILES_BYTES = 64 << 20
_COPY_BYTES = 16 << 20
# Rows of a vocabulary's router or norms that llama.cpp's own converter keeps in float32.
_GGUF_F32 = ("norm.weight", ".bias", "attn_sinks.weight", "ffn_gate_inp.weight")


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    format: Format
    size_bytes: int
    num_tensors: int = 0
    num_copied: int = 0  # whose bytes are those of the base
    # Of each matrix that was rounded to MXFP4, by key, such as layers.3.experts.gate.
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    # Of what was written against the unrounded sum; None when it was not asked for or there is nothing to compare.
    divergence: Divergence | None = None


def export(
    base: str | Path,
    out: str | Path,
    format: Format,
    *,
    adapter: str | Path | None = None,
    weights: str | Path | None = None,
    dense: DenseType = "q8_0",
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
    measure: bool = True,
    prompts: Sequence[str] = PROMPTS,
    progress: Progress | None = None,
) -> Exported:
    """Write ``base``, with an adapter's folder or a full fine-tune's weights on top, to ``out``.

    ``dense`` is for GGUF alone. ``measure``: compute how far what was written is from the unrounded model, where
    anything was rounded; for a true 20b that takes minutes. ``replace``: a checkpoint at ``out`` gives way.
    Raises NotFoundError and CheckpointError for inputs that are missing or damaged, InputError for options that do not
    go together and outputs that are in the way, UnavailableError when the disk is too full.
    """
    if format not in FORMATS:
        raise ConfigError(f"format is {format!r}; expected one of: {', '.join(FORMATS)}", param="format")
    if dense not in get_args(DenseType):
        raise ConfigError(f"dense is {dense!r}; expected one of: {', '.join(get_args(DenseType))}", param="dense")
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes is {shard_bytes}; expected at least 1", param="shard_bytes")
    checkpoint, out = Checkpoint.open(base), Path(out)
    _refuse_inputs_place(out, [checkpoint.folder, *checkpoint.files, *(Path(x) for x in (adapter, weights) if x)])
    pairs = None if adapter is None else read_adapter(adapter, checkpoint.config)
    if pairs is not None:
        check_base_copies(pairs, checkpoint)
    check_prompts(prompts)
    if format == "adapter":
        return _export_adapter(checkpoint, out, pairs, weights, replace=replace)
    if format == "merged" and checkpoint.layout.name == "ollama":
        raise InputError(
            f"{base} is a file of Ollama's own layout, which ossia reads and does not write. Choose gguf or mxfp4."
        )
    changes = {} if weights is None else read_tensors(weights, checkpoint.config)
    model = Merged(checkpoint, pairs, changes)
    writer = _Writer(model, progress)
    if format == "gguf":
        writer.write_gguf(out, dense, replace=replace)
    elif format == "merged" or _is_published(checkpoint, format):
        writer.write_in_place(out, replace=replace)
    else:
        writer.write_hugging_face(out, HF if format == "mxfp4" else HF_BF16, shard_bytes, replace=replace)
    written = Checkpoint.open(out)
    rounding = dict(sorted(writer.rounding.items()))
    found = None
    if measure and (rounding or model.changed or format == "gguf"):
        found = divergence(model, written, checkpoint, prompts)
    return Exported(out, format, written.size_bytes, len(written.tensors), writer.num_copied, rounding, found)


def _refuse_inputs_place(out: Path, inputs: Sequence[Path]) -> None:
    place = out.resolve()
    for path in inputs:
        if place == path.resolve() or place in path.resolve().parents:
            raise InputError(f"{out} is, or holds, {path}, which the export reads. Give another place for the output.")


def _is_published(checkpoint: Checkpoint, format: Format) -> bool:
    """Whether the base's files have the format already, so that they can be kept as they are but for what changed."""
    layout = "hf" if format == "mxfp4" else "hf-bf16"
    return checkpoint.layout.name == layout and all(
        entry.dtype in ("BF16", "U8") for entry in checkpoint.tensors.values()
    )


def _export_adapter(
    checkpoint: Checkpoint, out: Path, adapter: Adapter | None, weights: str | Path | None, *, replace: bool
) -> Exported:
    if adapter is None or weights is not None:
        raise InputError("the format adapter is for an adapter alone. Give its folder, and no other weights.")
    with new_path(out, sum(pair.a.nbytes + pair.b.nbytes for pair in adapter.pairs.values()), replace=replace) as place:
        write_adapter(place, adapter, checkpoint.config, adapter.base_model_name or checkpoint.folder.name)
        read_adapter(place, checkpoint.config)
    size_bytes = sum(path.stat().st_size for path in out.iterdir())
    return Exported(out, "adapter", size_bytes, num_tensors=2 * len(adapter.pairs))


class _Writer:
    """Writes one model, and counts."""

    def __init__(self, model: Merged, progress: Progress | None) -> None:
        self.model = model
        self.base = model.checkpoint
        self.progress = progress
        self.num_copied = 0
        self.rounding: dict[str, Rounding] = {}
        self._done_bytes = self._total_bytes = 0

    # The base's own files ---------------------------------------------------------------------------------------------

    def write_in_place(self, out: Path, *, replace: bool) -> None:
        """The base's files with the same names, headers and order; tensors that changed are made anew."""
        tensors = self._tensors(self.base.layout)
        for name, entry in self.base.tensors.items():
            if entry.dtype in QUANTISED_NAMES and tensors.keys(name) & self.model.changed:
                raise UnavailableError(
                    f"tensor {name} is changed, and {entry.dtype}, as the base has it, is read here and not written. "
                    "Export as gguf, mxfp4 or bf16."
                )
        self._total_bytes = self.base.size_bytes
        with new_path(out, self._total_bytes + _SIDE_FILES_BYTES, replace=replace) as place:
            place.mkdir()
            for file, mapped in self.base.maps.items():
                entries = [(name, entry) for name, entry in self.base.tensors.items() if entry.file == file]
                with open(place / _file_name(file, self.base), "wb") as target:
                    position = 0
                    for name, entry in sorted(entries, key=lambda item: item[1].offset):
                        write_pieces(target, _raw(mapped, position, entry.offset), self._written)
                        position = entry.offset + entry.size_bytes
                        size_bytes = write_pieces(target, self._pieces(tensors, name, entry.dtype), self._written)
                        assert size_bytes == entry.size_bytes, f"{name}: {size_bytes} bytes, not {entry.size_bytes}"
                    write_pieces(target, _raw(mapped, position, len(mapped)), self._written)
                    sync(target)
            self._copy_side_files(place)
            for name in ("config.json", "model.safetensors.index.json"):
                if (self.base.folder / name).is_file() and not self.base.metadata:
                    shutil.copyfile(self.base.folder / name, place / name)
            if self.base.has_random_weights and not self.model.is_random:
                fields = read_json(place / "config.json")
                write_json(place / "config.json", {k: value for k, value in fields.items() if k != RANDOM_WEIGHTS})
            Checkpoint.open(place)

    # Hugging Face -----------------------------------------------------------------------------------------------------

    def write_hugging_face(self, out: Path, layout: Layout, shard_bytes: int, *, replace: bool) -> None:
        """A folder as it is published."""
        tensors = self._tensors(layout)
        plan: Plan = {
            name: ("U8" if expected.dtypes == BYTES else "BF16", expected.shape)
            for name, expected in layout.expected(self.base.config).items()
        }
        shards = plan_shards(plan, shard_bytes)
        self._total_bytes = sum(map(tensor_bytes, plan.values()))
        with new_path(out, self._total_bytes + _SIDE_FILES_BYTES, replace=replace) as place:
            place.mkdir()
            for file_name, shard in shards.items():
                pieces = self._of(tensors, shard)
                write_safetensors(place / file_name, shard, pieces, self._written)
            write_index(place, shards)
            self._copy_side_files(place)
            write_json(place / "config.json", self._hugging_face_config(mxfp4=layout is HF))
            if not (place / "generation_config.json").is_file():
                sampling = self.base.sampling()
                # How transformers says temperature 0.
                how = {"do_sample": False} if sampling.get("temperature") == 0 else sampling
                write_json(place / "generation_config.json", generation_config(self.base.config) | how)
            tokenizer = self._tokenizer_json()
            if tokenizer is not None and not (place / "tokenizer.json").is_file():
                (place / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
            template = self._chat_template()
            if template is not None and not (place / "chat_template.jinja").is_file():
                (place / "chat_template.jinja").write_text(template, encoding="utf-8")
            Checkpoint.open(place)

    def _hugging_face_config(self, *, mxfp4: bool) -> dict[str, Any]:
        fields = hugging_face_config(self.base.config, mxfp4=mxfp4)
        for folder in self._folders():
            path = folder / "config.json"
            own = read_json(path) if path.is_file() else {}
            # The one in original/ is silent about the model's type, and spelled otherwise.
            if "model_type" in own:
                replaced = ("quantization_config", "dtype", RANDOM_WEIGHTS)
                kept = {name: value for name, value in own.items() if name not in replaced}
                quantization = {"quantization_config": fields["quantization_config"]} if mxfp4 else {}
                # FSDP renames the architecture of what it wraps, and nothing loads it then.
                fields = kept | {"architectures": fields["architectures"], "torch_dtype": "bfloat16"} | quantization
                break
        return fields | ({RANDOM_WEIGHTS: True} if self.model.is_random else {})

    # GGUF -------------------------------------------------------------------------------------------------------------

    def write_gguf(self, out: Path, dense: DenseType, *, replace: bool) -> None:
        """One file as llama.cpp's own converter makes it."""
        if out.suffix != ".gguf":
            raise InputError(f"a GGUF file's name ends in .gguf, and {out} does not. Give one such as {out}.gguf.")
        config, layout = self.base.config, Gguf(fused=False)
        tokenizer = self._tokenizer_json()
        if tokenizer is None:
            self.base.tokenizer()  # says what is missing
            raise CheckpointError(f"{self.base.folder} has no tokenizer.json, which a GGUF file needs.")
        template, sampling = self._chat_template(), self.base.sampling()
        metadata = gpt_oss_metadata(config, json.loads(tokenizer), out.stem, template, sampling)
        tensors = self._tensors(layout)
        plan: Plan = {}
        for name, expected in layout.expected(config).items():
            dtype = "Q8_0" if dense == "q8_0" else "BF16"
            if name.endswith("_exps.weight"):
                dtype = "MXFP4"
            elif name.endswith(_GGUF_F32):
                dtype = "F32"
            elif dtype == "Q8_0" and expected.shape[-1] % 32:
                # As ggml: a row of Q8_0 is whole blocks.
                dtype = "BF16"
            plan[name] = (dtype, expected.shape)
        self._total_bytes = sum(map(gguf_bytes, plan.values()))
        with new_path(out, self._total_bytes + _SIDE_FILES_BYTES, replace=replace) as place:
            write_gguf(place, metadata, plan, self._of(tensors, plan), self._written)

    # Parts ------------------------------------------------------------------------------------------------------------

    def _tensors(self, layout: Layout) -> Tensors:
        tensors = Tensors(self.model, layout)
        self.rounding = tensors.rounding
        return tensors

    def _of(self, tensors: Tensors, plan: Plan) -> Callable[[str], Iterator[npt.NDArray[Any]]]:
        return lambda name: self._pieces(tensors, name, plan[name][0])

    def _pieces(self, tensors: Tensors, name: str, dtype: str) -> Iterator[npt.NDArray[Any]]:
        """A tensor's bytes: those of the base where it has the same, untouched."""
        entry = self._same_in_base(tensors, name, dtype)
        if entry is None:
            return tensors.pieces(name, dtype)
        self.num_copied += 1
        return _raw(self.base.maps[entry.file], entry.offset, entry.offset + entry.size_bytes)

    def _same_in_base(self, tensors: Tensors, name: str, dtype: str) -> TensorEntry | None:
        entry = self.base.tensors.get(name)
        is_same = entry is not None and entry.dtype == dtype and not tensors.keys(name) & self.model.changed
        return entry if is_same else None

    def _written(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        if self.progress is not None:
            self.progress(min(self._done_bytes, self._total_bytes), self._total_bytes)

    def _folders(self) -> list[Path]:
        """Where the base's small files are: beside its weights, and beside its original/ folder.

        A GGUF file has all in itself, and what lies beside it may be another model's.
        """
        if self.base.metadata:
            return []
        folder = self.base.folder
        return [folder, folder.parent] if folder.name == "original" else [folder]

    def _copy_side_files(self, place: Path) -> None:
        for name in _SIDE_FILES:
            path = next((folder / name for folder in self._folders() if (folder / name).is_file()), None)
            if path is not None:
                shutil.copyfile(path, place / name)

    def _tokenizer_json(self) -> str | None:
        if self.base.tokenizer_path is not None:
            return self.base.tokenizer_path.read_text(encoding="utf-8")
        document = tokenizer_document(self.base.files[0], self.base.metadata)
        if document is not None:
            return Tokenizer.from_document(document, str(self.base.files[0])).to_tokenizer_json()
        tokenizer = Tokenizer.o200k_harmony()
        return tokenizer.to_tokenizer_json() if tokenizer.vocab_size == self.base.config.vocab_size else None

    def _chat_template(self) -> str | None:
        for folder in self._folders():
            path = folder / "chat_template.jinja"
            if path.is_file():
                return path.read_text(encoding="utf-8")
            # Where transformers had it before.
            for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
                if path.is_file() and (found := _template(read_json(path).get("chat_template"))) is not None:
                    return found
        return _template(self.base.metadata.get("tokenizer.chat_template"))


def _template(found: object) -> str | None:
    """A template, or of several by name the usual one."""
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _file_name(file: Path, base: Checkpoint) -> str:
    """What a copy is called. In Ollama's store files have no suffix, and nothing would take it for a model."""
    return f"{file.name}.gguf" if base.metadata and file.suffix != ".gguf" else file.name


def _raw(mapped: npt.NDArray[np.uint8], start: int, end: int) -> Iterator[npt.NDArray[np.uint8]]:
    for position in range(start, end, _COPY_BYTES):
        piece = mapped[position : min(position + _COPY_BYTES, end)]
        yield piece
        give_back(piece)
