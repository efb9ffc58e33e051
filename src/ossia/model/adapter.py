"""LoRA adapters in PEFT's folder: adapter_config.json and adapter_model.safetensors, read and written without torch.

    y = W x + scaling * b (a x)         a [r, I], b [O, r]; for experts one pair each: a [E, r, I], b [E, O, r]

    our key                   tensors, each behind base_model.model.                       lora_A        lora_B
    layers.3.q (k, v, o)      model.layers.3.self_attn.q_proj.lora_A.weight, .lora_B...    [r, I]        [O, r]
    layers.3.router           model.layers.3.mlp.router...                                 [r, D]        [E, r]
    layers.3.experts.gate     model.layers.3.mlp.experts..., both matrices as one:         [r E, D]      [2 F, r E]
    layers.3.experts.up         rows of gate and up alternate in lora_B, lora_A is shared
    layers.3.experts.down     model.layers.3.mlp.experts...                                [r E, F]      [D, r E]
    embedding                 model.embed_tokens.lora_embedding_A, .lora_embedding_B       [r, V]        [D, r]
    unembedding               lm_head...                                                   [r, D]        [V, r]

The experts are parameters and no modules: PEFT wraps one parameter in the next, so that where both are adapted, those
of gate_up_proj are named mlp.experts.base_layer. Which is which is told by the shapes. Rows of an experts' lora_A go by
(expert, rank), columns of lora_B by (rank, expert). Where PEFT does not learn that the experts lie transposed, it takes
their inputs for outputs and the other way round; that is read as well, and so are adapters of models whose experts were
cut into modules, mlp.experts.gate_up_projs.5 and mlp.experts.down_projs.5, as Unsloth trains them.

Sources: PEFT 0.17 to 0.21, `tuners/lora/layer.py` (ParamWrapper, Embedding) and `utils/save_and_load.py`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ossia.errors import CheckpointError, NotFoundError
from ossia.model.config import ModelConfig
from ossia.model.config_file import read_json
from ossia.model.safetensors_file import DTYPES, TensorEntry, header_bytes, map_file, read_header
from ossia.ops import LoraPair

Floats = npt.NDArray[Any]

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter: its pairs by key, and what its settings say of it as a whole.

    Arrays are float32, float16 or bfloat16, read-only views of the file where they were read. ``rank`` and ``alpha``
    are those that most pairs have; what counts is the rank and scaling of each pair.
    """

    name: str
    rank: int
    alpha: float
    pairs: Mapping[str, LoraPair]
    base_model_name: str | None = None
    # Copies of the base model's embedding and unembedding, which PEFT adds to the file where these are adapted.
    base_copies: Mapping[str, Floats] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        pairs = dict(self.pairs)
        # Gate and up of one file share their a.
        shared = sum(
            pair.a.size
            for key, pair in pairs.items()
            if key.endswith(".gate") and (up := pairs.get(_up_of(key))) is not None and up.a is pair.a
        )
        return sum(pair.a.size + pair.b.size for pair in pairs.values()) - shared


def matrix_shape(key: str, config: ModelConfig) -> tuple[int, ...] | None:
    """The shape (O, I), or (E, O, I) for experts, of the matrix that a key names; None where it names none."""
    D, F, V, E = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_experts
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    outer = {"embedding": (D, V), "unembedding": (V, D)}
    inner = {
        "q": (q_rows, D),
        "k": (kv_rows, D),
        "v": (kv_rows, D),
        "o": (D, q_rows),
        "router": (E, D),
        "experts.gate": (E, F, D),
        "experts.up": (E, F, D),
        "experts.down": (E, D, F),
    }
    if key in outer:
        return outer[key]
    match = re.fullmatch(r"layers\.(0|[1-9][0-9]*)\.([a-z.]+)", key)
    return inner.get(match[2]) if match is not None and int(match[1]) < config.num_layers else None


# Reading -------------------------------------------------------------------------------------------------------------


def read_adapter(path: str | Path, config: ModelConfig, name: str | None = None) -> Adapter:
    """The adapter in a folder, checked against the model that it is for. Its name is the folder's unless given.

    Raises NotFoundError when there is no such folder, CheckpointError when files are missing or damaged, when the
    adapter was made for another model, or is of a kind that ossia does not compute.
    """
    folder = Path(path)
    try:
        if not folder.is_dir():
            raise NotFoundError(f"there is no folder {folder}. Expected one with {CONFIG_NAME} and {WEIGHTS_NAME}.")
        settings = _read_settings(folder)
        tensors = _read_tensors(folder)
        pairs, copies = _read_pairs(folder, settings, tensors, config)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from error
    return Adapter(
        name or folder.resolve().name, settings.rank, settings.alpha, pairs, settings.base_model_name, copies
    )


class _Settings(NamedTuple):
    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    target_parameters: tuple[str, ...]
    base_model_name: str | None

    def name_of(self, module: str) -> str:
        """What the patterns call it: a module, or its weight where that was the target."""
        weight = f"{module}.weight"
        is_parameter = any(weight == target or weight.endswith(f".{target}") for target in self.target_parameters)
        return weight if is_parameter else module

    def rank_of(self, module: str) -> int:
        return int(self._by_pattern(self.rank_pattern, module, self.rank))

    def scaling(self, module: str) -> float:
        rank = self.rank_of(module)
        return self._by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def _by_pattern(self, patterns: Mapping[str, float], module: str, default: float) -> float:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default


# Settings of PEFT that say how an adapter is trained or stored, and nothing about what it computes.
_WITHOUT_EFFECT = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "bias",
        "use_rslora",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "target_parameters",
        "runtime_config",
        "ensure_weight_tying",
        "target_modules_to_tie",
    ]
)
# Ways to begin that leave the base model's weights as they are; others (pissa, corda, olora, loftq, lora_ga) take from
# them what they put into the adapter.
_KEEPS_BASE = ("gaussian", "eva", "orthogonal")


def _read_settings(folder: Path) -> _Settings:
    path = folder / CONFIG_NAME
    if not path.is_file():
        hint = " It holds a model: an adapter is given beside its model." if (folder / "config.json").is_file() else ""
        if (folder / "adapter" / CONFIG_NAME).is_file():
            hint = f" That of this run is {folder / 'adapter'}."
        raise CheckpointError(f"{folder} holds no {CONFIG_NAME}, so it is no adapter as PEFT writes them.{hint}")
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {values.get('peft_type')!r}; ossia runs adapters of type 'LORA' alone."
        )
    if values.get("use_dora"):
        raise CheckpointError(f"{path}: use_dora is set; ossia does not run DoRA. {_MERGE}")
    if values.get("modules_to_save"):
        raise CheckpointError(
            f"{path}: modules_to_save is {values['modules_to_save']!r}: the adapter brings whole modules of its own, "
            f"which an adapter that is served beside others cannot. {_MERGE}"
        )
    if (bias := values.get("bias", "none")) != "none":
        raise CheckpointError(f"{path}: bias is {bias!r}; ossia does not run adapters that change biases. {_MERGE}")
    begin = values.get("init_lora_weights")
    if isinstance(begin, str) and begin.lower() not in _KEEPS_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights is {begin!r}, which may have changed the base model's weights. Save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, which turns it into an ordinary one."
        )
    if unknown := sorted(name for name, value in values.items() if value and name not in _WITHOUT_EFFECT):
        raise CheckpointError(
            f"{path}: ossia does not know what {', '.join(unknown)} may change. {_MERGE} If the setting changes "
            "nothing in what the adapter computes, take it out of the file."
        )
    rank_pattern, alpha_pattern = (_pattern(path, values, name) for name in ("rank_pattern", "alpha_pattern"))
    base_model_name = values.get("base_model_name_or_path")
    return _Settings(
        path,
        int(_number(path, "r", values.get("r", 8))),
        _number(path, "lora_alpha", values.get("lora_alpha", 8)),
        rank_pattern,
        alpha_pattern,
        bool(values.get("use_rslora")),
        _names(path, "target_parameters", values.get("target_parameters") or []),
        base_model_name if isinstance(base_model_name, str) else None,
    )


_MERGE = "Merge it into its model with PEFT and use the merged model."


def _number(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise CheckpointError(f"{path}: {name} is {json.dumps(value)[:100]}; expected a number above 0.")
    return float(value)


def _names(path: Path, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise CheckpointError(f"{path}: {name} is {json.dumps(value)[:100]}; expected a list of names.")
    return tuple(value)


def _pattern(path: Path, values: Mapping[str, Any], name: str) -> dict[str, float]:
    given = values.get(name) or {}
    if not isinstance(given, dict):
        raise CheckpointError(
            f"{path}: {name} is {json.dumps(given)[:100]}; expected an object of modules and numbers."
        )
    for pattern in given:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{path}: {name} has {pattern!r}, no regular expression: {error}.") from None
    return {pattern: _number(path, f"{name}[{pattern!r}]", value) for pattern, value in given.items()}


def _read_tensors(folder: Path) -> dict[str, tuple[TensorEntry, Floats]]:
    """Every tensor of the folder's file, or of its shards, with its values as a view."""
    single, index = folder / WEIGHTS_NAME, folder / f"{WEIGHTS_NAME}.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
            raise CheckpointError(f"{index}: weight_map is not an object of tensors and their files.")
        files = [folder / file for file in sorted(set(weight_map.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of its {len(files)} shards: {', '.join(missing[:4])}."
            )
    elif (folder / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{folder} holds adapter_model.bin, a pickle, which could run code when it is read. Load the adapter with "
            "PEFT and save it again with safe_serialization=True."
        )
    else:
        raise CheckpointError(f"{folder} holds {CONFIG_NAME} but no {WEIGHTS_NAME}. Copy the adapter again.")
    tensors: dict[str, tuple[TensorEntry, Floats]] = {}
    for file in files:
        mapped = map_file(file)
        for name, entry in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is in {tensors[name][0].file} and in {file}; expected it once.")
            if entry.dtype not in ("F32", "F16", "BF16"):
                raise CheckpointError(f"{file}: tensor {name} is {entry.dtype}; expected F32, F16 or BF16.")
            values = mapped[entry.offset : entry.offset + entry.size_bytes]
            if entry.offset % DTYPES[entry.dtype].itemsize:
                values = values.copy()
            tensors[name] = entry, values.view(DTYPES[entry.dtype]).reshape(entry.shape)
    return tensors


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name


_PREFIX = "base_model.model."
_LINEAR = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.router": "router",
    "mlp.router.linear": "router",
}
_EXPERTS = ("mlp.experts", "mlp.experts.base_layer")
_OUTER = {"model.embed_tokens": "embedding", "lm_head": "unembedding"}
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
}
_TARGETS = (
    "q_proj, k_proj, v_proj, o_proj, mlp.router.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj, embed_tokens "
    "and lm_head"
)


def _read_pairs(
    folder: Path, settings: _Settings, tensors: Mapping[str, tuple[TensorEntry, Floats]], config: ModelConfig
) -> tuple[dict[str, LoraPair], dict[str, Floats]]:
    modules: dict[str, dict[str, Floats]] = {}
    copies: dict[str, Floats] = {}
    for name, (entry, values) in tensors.items():
        module, part = _module_and_part(entry.file, name)
        if part == "base":
            _expect_shape(entry.file, name, values, config.vocab_size, config.hidden_size)
            copies[_OUTER[module]] = values
        else:
            modules.setdefault(module, {})[part] = values
    if not modules:
        raise CheckpointError(f"{folder} holds an adapter of no tensors.")
    # The model's own down_proj has as many inputs as outputs: gate_up_proj tells for both.
    exchanged = config.intermediate_size * 2, config.hidden_size
    is_exchanged = exchanged[0] != exchanged[1] and any(
        module.endswith(_EXPERTS) and (parts["a"].shape[-1:], parts["b"].shape[:1]) == (exchanged[:1], exchanged[1:])
        for module, parts in modules.items()
        if len(parts) == 2
    )
    pairs: dict[str, LoraPair] = {}
    cut: dict[str, dict[int, tuple[str, Floats, Floats]]] = {}
    for module, parts in modules.items():
        if lacking := {"a", "b"} - parts.keys():
            raise CheckpointError(f"{folder}: {module} lacks its lora_{lacking.pop().upper()}. Copy the adapter again.")
        if not (_is_finite(parts["a"]) and _is_finite(parts["b"])):
            raise CheckpointError(f"{folder}: the adapter of {module} holds a NaN or an infinity. Train it again.")
        if match := re.fullmatch(r"(model\.layers\.[0-9]+\.mlp\.experts\.(?:gate_up|down)_proj)s\.([0-9]+)", module):
            cut.setdefault(match[1], {})[int(match[2])] = module, parts["a"], parts["b"]
            continue
        made = _pairs_of_module(folder, settings, module, parts["a"], parts["b"], config, is_exchanged=is_exchanged)
        _add(folder, pairs, made)
    for parameter, experts in cut.items():
        _add(folder, pairs, _pairs_of_cut_experts(folder, settings, parameter, experts, config))
    return dict(sorted(pairs.items(), key=_natural)), copies


def _add(folder: Path, pairs: dict[str, LoraPair], more: Iterable[tuple[str, LoraPair]]) -> None:
    for key, pair in more:
        if key in pairs:
            raise CheckpointError(f"{folder} adapts {key} twice; expected gate_up_proj and down_proj once.")
        pairs[key] = pair


def _module_and_part(file: Path, name: str) -> tuple[str, str]:
    """The module of the base model that a tensor belongs to, and "a", "b", or "base" for a copy of its weights."""
    module = name.removeprefix(_PREFIX)
    if module.startswith("layers."):
        # An adapter of the model without its unembedding.
        module = f"model.{module}"
    for ending, part in _PARTS.items():
        if name.startswith(_PREFIX) and module.endswith(ending):
            return module.removesuffix(ending), part
    if module.removesuffix(".base_layer.weight") in _OUTER:
        return module.removesuffix(".base_layer.weight"), "base"
    if "lora_magnitude_vector" in name:
        raise CheckpointError(f"{file}: tensor {name} belongs to DoRA, which ossia does not run. {_MERGE}")
    if name.endswith(".bias"):
        raise CheckpointError(f"{file}: tensor {name} changes a bias, which ossia's adapters do not. {_MERGE}")
    raise CheckpointError(
        f"{file}: tensor {name} is no part of a LoRA adapter of GptOssForCausalLM: expected "
        f"{_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight and the like."
    )


def _pairs_of_module(
    folder: Path,
    settings: _Settings,
    module: str,
    a: Floats,
    b: Floats,
    config: ModelConfig,
    *,
    is_exchanged: bool,
) -> Iterator[tuple[str, LoraPair]]:
    match = re.fullmatch(r"model\.layers\.([0-9]+)\.(.+)", module)
    layer, inner = (match[1], match[2]) if match else ("", "")
    if a.ndim != 2 or b.ndim != 2:
        raise CheckpointError(
            f"{folder}: {module} has a pair of shapes {a.shape} and {b.shape}; expected two matrices."
        )
    if match and int(layer) >= config.num_layers:
        raise CheckpointError(
            f"{folder} adapts {module}, and this model has {config.num_layers} layers. {_other_model(settings)}"
        )
    if match and inner in _EXPERTS:
        name = f"model.layers.{layer}.mlp.experts"
        yield from _pairs_of_experts(folder, settings, name, a, b, config, is_exchanged=is_exchanged)
        return
    key = f"layers.{layer}.{_LINEAR[inner]}" if inner in _LINEAR else _OUTER.get(module)
    if key is None:
        raise CheckpointError(f"{folder} adapts {module}, which ossia does not adapt; it knows {_TARGETS}.")
    num_outputs, num_inputs = matrix_shape(key, config) or (0, 0)
    peft_name = settings.name_of(module)
    rank = settings.rank_of(peft_name)
    if a.shape != (rank, num_inputs) or b.shape != (num_outputs, rank):
        raise CheckpointError(
            f"{folder}: {module} has a pair of shapes {a.shape} and {b.shape}; expected ({rank}, {num_inputs}) and "
            f"({num_outputs}, {rank}) for this model and the rank in {CONFIG_NAME}. {_other_model(settings)}"
        )
    yield key, LoraPair(a, b, settings.scaling(peft_name))


def _pairs_of_experts(
    folder: Path, settings: _Settings, module: str, a: Floats, b: Floats, config: ModelConfig, *, is_exchanged: bool
) -> Iterator[tuple[str, LoraPair]]:
    E, D, F = config.num_experts, config.hidden_size, config.intermediate_size
    shape = (b.shape[0], a.shape[1]) if is_exchanged else (a.shape[1], b.shape[0])
    parameter = {(D, 2 * F): "gate_up_proj", (F, D): "down_proj"}.get(shape, "")
    if not parameter and shape == (D, F):
        # Alone in its file, and exchanged.
        parameter, is_exchanged = "down_proj", True
    name = f"{module}.{parameter}"
    rank = settings.rank_of(name)
    if not parameter or a.shape[0] != rank * E or b.shape[1] != rank * E:
        raise CheckpointError(
            f"{folder}: {module} has a pair of shapes {a.shape} and {b.shape}; expected ({rank * E}, {D}) and "
            f"({2 * F}, {rank * E}) for gate_up_proj, or ({rank * E}, {F}) and ({D}, {rank * E}) for down_proj, for "
            f"this model's {E} experts and the rank in {CONFIG_NAME}. {_other_model(settings)}"
        )
    a_ErI = a.reshape(E, rank, -1)
    b_EOr = b.reshape(-1, rank, E).transpose(2, 0, 1)
    if is_exchanged:
        a_ErI, b_EOr = b_EOr.swapaxes(1, 2), a_ErI.swapaxes(1, 2)
    yield from _expert_pairs(name, a_ErI, b_EOr, settings.scaling(name))


def _pairs_of_cut_experts(
    folder: Path,
    settings: _Settings,
    parameter: str,
    experts: Mapping[int, tuple[str, Floats, Floats]],
    config: ModelConfig,
) -> Iterator[tuple[str, LoraPair]]:
    """The pairs of modules that are one expert each; an expert without one stays as it is."""
    E, D, F = config.num_experts, config.hidden_size, config.intermediate_size
    num_inputs, num_outputs = (D, 2 * F) if parameter.endswith("gate_up_proj") else (F, D)
    layer = int(parameter.split(".")[2])
    first, some_a, some_b = next(iter(experts.values()))
    rank, scaling = settings.rank_of(first), settings.scaling(first)
    a_ErI = np.zeros((E, rank, num_inputs), some_a.dtype)
    b_EOr = np.zeros((E, num_outputs, rank), some_b.dtype)
    for expert, (module, a, b) in experts.items():
        own = settings.rank_of(module), settings.scaling(module)
        if layer >= config.num_layers or expert >= E or own != (rank, scaling):
            raise CheckpointError(
                f"{folder} adapts {module} with rank and scaling {own}; expected {(rank, scaling)} as of {first}, and "
                f"one of {config.num_layers} layers and {E} experts. {_other_model(settings)}"
            )
        if a.shape != a_ErI.shape[1:] or b.shape != b_EOr.shape[1:]:
            raise CheckpointError(
                f"{folder}: {module} has a pair of shapes {a.shape} and {b.shape}; expected {a_ErI.shape[1:]} and "
                f"{b_EOr.shape[1:]} for this model and the rank in {CONFIG_NAME}. {_other_model(settings)}"
            )
        a_ErI[expert], b_EOr[expert] = a, b
    yield from _expert_pairs(parameter, a_ErI, b_EOr, scaling)


def _expert_pairs(parameter: str, a_ErI: Floats, b_EOr: Floats, scaling: float) -> Iterator[tuple[str, LoraPair]]:
    """Our pairs of one parameter of the experts, such as model.layers.0.mlp.experts.down_proj."""
    key = f"layers.{int(parameter.split('.')[2])}.experts"
    if parameter.endswith("down_proj"):
        yield f"{key}.down", LoraPair(a_ErI, b_EOr, scaling)
    else:
        yield f"{key}.gate", LoraPair(a_ErI, b_EOr[:, 0::2], scaling)
        yield f"{key}.up", LoraPair(a_ErI, b_EOr[:, 1::2], scaling)


def _other_model(settings: _Settings) -> str:
    name = settings.base_model_name
    return f"It was made for {name!r}: serve that model." if name else "It was made for another model."


def _expect_shape(file: Path, name: str, values: Floats, *shape: int) -> None:
    if values.shape != shape:
        raise CheckpointError(f"{file}: tensor {name} has shape {values.shape}; expected {shape} for this model.")


def _is_finite(values: Floats) -> bool:
    # A NaN or an infinity anywhere makes the sum one; a sum of 1e7 float16 or bfloat16 numbers cannot overflow.
    return bool(np.isfinite(values.sum(dtype=np.float64)))


def _natural(item: tuple[str, Any]) -> list[Any]:
    return [(not part.isdecimal(), int(part) if part.isdecimal() else part) for part in item[0].split(".")]


# Writing -------------------------------------------------------------------------------------------------------------


def write_adapter(path: str | Path, adapter: Adapter, config: ModelConfig, base_model_name: str | None = None) -> Path:
    """Write a folder that PEFT loads, and return it. A file that is there already is replaced by a whole one.

    Arrays keep their dtype where it is float32, float16 or bfloat16. Gate and up share one matrix in PEFT: where theirs
    differ, the file has one of both ranks together.
    """
    folder = Path(path)
    modules: dict[str, _Module] = {}
    for key, pair in sorted(adapter.pairs.items(), key=_natural):
        shape = matrix_shape(key, config)
        assert shape is not None, f"{key} names no matrix of this model"
        assert pair.a.shape == (*shape[:-2], pair.rank, shape[-1]), f"{key}: a is {pair.a.shape}"
        assert pair.b.shape == (*shape[:-1], pair.rank), f"{key}: b is {pair.b.shape}"
        layer, _, part = key.removeprefix("layers.").partition(".")
        if key in _OUTER.values():
            name = next(name for name, own in _OUTER.items() if own == key)
            modules[name] = _Module(name, name, pair)
        elif part == "experts.down":
            name = f"model.layers.{layer}.mlp.experts"
            modules[f"{name}.down_proj"] = _Module(f"{name}.down_proj", name, pair, is_parameter=True)
        elif part in ("experts.gate", "experts.up"):
            name = f"model.layers.{layer}.mlp.experts"
            joined = _gate_up(adapter.pairs, f"layers.{layer}.experts")
            has_both = f"layers.{layer}.experts.down" in adapter.pairs
            inner = f"{name}.base_layer" if has_both else name
            modules[f"{name}.gate_up_proj"] = _Module(f"{name}.gate_up_proj", inner, joined, is_parameter=True)
        else:
            name = next(f"model.layers.{layer}.{name}" for name, own in _LINEAR.items() if own == part)
            is_router = part == "router"
            peft_name = f"{name}.weight" if is_router else name
            modules[peft_name] = _Module(peft_name, name, pair, is_parameter=is_router)
    tensors: dict[str, Floats] = {}
    for module in modules.values():
        a, b = _as_stored(module.pair)
        ending = ("embedding_A", "embedding_B") if module.tensor_name == "model.embed_tokens" else _WEIGHTS
        tensors[f"{_PREFIX}{module.tensor_name}.lora_{ending[0]}"] = a
        tensors[f"{_PREFIX}{module.tensor_name}.lora_{ending[1]}"] = b
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / WEIGHTS_NAME, lambda file: _write_tensors(file, tensors))
    text = json.dumps(_peft_config(list(modules.values()), config, base_model_name), indent=2) + "\n"
    _replace(folder / CONFIG_NAME, lambda file: file.write(text.encode()))
    return folder


_WEIGHTS = ("A.weight", "B.weight")


class _Module(NamedTuple):
    """One pair as PEFT names it: in its settings, and in its file."""

    peft_name: str
    tensor_name: str
    pair: LoraPair
    is_parameter: bool = False


def _up_of(gate_key: str) -> str:
    return gate_key.removesuffix(".gate") + ".up"


def _gate_up(pairs: Mapping[str, LoraPair], prefix: str) -> LoraPair:
    """Gate and up as one pair over alternating rows."""
    gate, up = pairs.get(f"{prefix}.gate"), pairs.get(f"{prefix}.up")
    first = gate or up
    assert first is not None
    num_experts, num_rows = first.b.shape[:2]
    is_shared = gate is None or up is None or np.array_equal(gate.a, up.a)
    dtype = first.b.dtype if gate is None or up is None or gate.b.dtype == up.b.dtype else np.dtype(np.float32)
    each = [(start, pair) for start, pair in ((0, gate), (1, up)) if pair is not None]
    a = first.a if is_shared else np.concatenate([pair.a for _, pair in each], axis=1)
    b = np.zeros((num_experts, 2 * num_rows, a.shape[1]), dtype)
    column = 0
    for start, pair in each:
        # One scaling for both: what is left of the other's goes into its rows.
        values = pair.b if pair.scaling == first.scaling else pair.b * b.dtype.type(pair.scaling / first.scaling)
        b[:, start::2, column : column + pair.rank] = values
        column += 0 if is_shared else pair.rank
    return LoraPair(a, b, first.scaling)


def _as_stored(pair: LoraPair) -> tuple[Floats, Floats]:
    a, b = pair.a, pair.b
    if a.ndim == 3:
        num_experts, rank, num_inputs = a.shape
        a = a.reshape(num_experts * rank, num_inputs)
        b = b.transpose(1, 2, 0).reshape(-1, rank * num_experts)
    return _plain(a), _plain(b)


def _plain(values: Floats) -> Floats:
    return np.ascontiguousarray(values if values.dtype in _NAMES else values.astype(np.float32))


_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "U8"}


def _peft_config(modules: list[_Module], config: ModelConfig, base_model_name: str | None) -> dict[str, Any]:
    rank, rank_pattern = _with_pattern({module.peft_name: module.pair.rank for module in modules})
    alpha, alpha_pattern = _with_pattern({module.peft_name: _alpha(module.pair) for module in modules})
    parameters = [module.peft_name for module in modules if module.is_parameter]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "target_modules": _targets([module.peft_name for module in modules if not module.is_parameter], config),
        "target_parameters": _targets(parameters, config) or None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def _alpha(pair: LoraPair) -> float:
    alpha = pair.scaling * pair.rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def _with_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The value that most modules have, and those of the others: by ending where all layers agree, else by name."""
    usual = Counter(values.values()).most_common(1)[0][0]
    of_ending: dict[str, set[float]] = {}
    for name, value in values.items():
        of_ending.setdefault(_ending(name), set()).add(value)
    pattern = {
        _ending(name) if len(of_ending[_ending(name)]) == 1 else name: value
        for name, value in values.items()
        if value != usual
    }
    return usual, pattern


def _targets(names: list[str], config: ModelConfig) -> list[str]:
    """The shortest list that matches these modules alone: an ending where every layer has it, else whole names."""
    counts = Counter(map(_ending, names))
    is_everywhere = {ending: count == (config.num_layers if "." in ending else 1) for ending, count in counts.items()}
    return sorted({_ending(name) if is_everywhere[_ending(name)] else name for name in names})


def _ending(name: str) -> str:
    """What a module is called in every layer: self_attn.q_proj; embed_tokens and lm_head stand for themselves."""
    return name.split(".", 3)[3] if name.startswith("model.layers.") else name.removeprefix("model.")


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_tensors(file: Any, tensors: Mapping[str, Floats]) -> None:
    # Wider dtypes first: every tensor is then aligned.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    file.write(header_bytes({name: (_NAMES[values.dtype], values.shape) for name, values in ordered.items()}))
    for values in ordered.values():
        file.write(values.tobytes())
