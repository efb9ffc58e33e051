"""config.json and generation_config.json, in all their published spellings, to and from `ModelConfig`.

    meaning               Hugging Face                                  original/
    experts               num_local_experts                             num_experts
    experts per token     num_experts_per_tok                           experts_per_token
    rotary base           rope_theta, or inside rope_parameters         rope_theta
    YaRN                  rope_scaling or rope_parameters: {rope_type,  rope_scaling_factor, rope_ntk_alpha (beta_slow),
                          factor, beta_fast, beta_slow, truncate}       rope_ntk_beta (beta_fast)
    context before YaRN   original_max_position_embeddings there        initial_context_length
    context               max_position_embeddings                       initial_context_length * rope_scaling_factor
    layer kinds           layer_types; missing: alternating             alternating

Sources: config.json of openai/gpt-oss-20b and -120b, of their original/ folders, and of transformers 4.55 to 5.23.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ossia.errors import CheckpointError
from ossia.model.config import FULL_ATTENTION, SLIDING_ATTENTION, ModelConfig, RopeConfig
from ossia.model.safetensors_file import refuse_lfs_pointer
from ossia.ops import SWIGLU_ALPHA

_DEFAULTS = ModelConfig()
CONFIG_REMEDY = "Use the config.json that was published with the weights."

RANDOM_WEIGHTS = "ossia_random_weights"
"""Field of config.json that marks a checkpoint whose weights mean nothing, so that nobody takes noise for an answer."""


def read_config(folder: Path) -> ModelConfig:
    """The configuration that lies beside a checkpoint's weights.

    Raises CheckpointError when config.json is missing, corrupt, incomplete, or of another architecture.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds weights but no config.json. Copy it there from the model's repository.")
    fields = Fields(path, read_json(path))
    _refuse_other_architectures(fields)
    generation_path = folder / "generation_config.json"
    generation = Fields(generation_path, read_json(generation_path) if generation_path.is_file() else {})

    num_layers = fields.integer("num_hidden_layers")
    vocab_size = fields.integer("vocab_size")
    rope = _rope(fields)
    config = ModelConfig(
        num_layers=num_layers,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=fields.integer("num_attention_heads"),
        num_kv_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim"),
        vocab_size=vocab_size,
        num_experts=fields.integer("num_local_experts", "num_experts"),
        num_active_experts=fields.integer("num_experts_per_tok", "experts_per_token"),
        sliding_window=fields.integer("sliding_window"),
        layer_types=_layer_types(fields, num_layers),
        max_context=fields.integer("max_position_embeddings", default=int(rope.original_context * rope.factor)),
        rms_norm_eps=fields.number("rms_norm_eps", default=_DEFAULTS.rms_norm_eps),
        swiglu_limit=fields.number("swiglu_limit", default=_DEFAULTS.swiglu_limit),
        rope=rope,
        stop_token_ids=_stop_token_ids(generation, fields, vocab_size),
        pad_token_id=_pad_token_id(generation, fields, vocab_size),
    )
    check_consistency(fields, config)
    return config


# What a checkpoint may say of sampling, as generation_config.json and `SamplingParams` name it, and the most it may be.
_MOST = {"temperature": math.inf, "top_p": 1.0, "top_k": math.inf, "min_p": 1.0, "repetition_penalty": math.inf}


def read_sampling(path: Path) -> dict[str, float]:
    """How to sample where a request does not say, of a generation_config.json; fields of `SamplingParams`.

    A field that is not named stays as `SamplingParams` has it: the top_k of 50 that transformers takes then is not
    assumed. ``"do_sample": false`` is temperature 0. Raises CheckpointError for a number that cannot be.

    Source: vLLM, which takes the same fields by default (`--generation-config auto`) and max_new_tokens besides.
    """
    fields = Fields(path, read_json(path), remedy="Correct it, or take the field out.")
    found = sampling_fields(fields, {name: name for name in _MOST})
    return found | {"temperature": 0.0} if fields.get("do_sample") is False else found


def sampling_fields(fields: Fields, names: Mapping[str, str]) -> dict[str, float]:
    """The ``fields`` that are there, called ``names`` there, as those of `SamplingParams`. Raises CheckpointError."""
    found: dict[str, float] = {}
    for name, called in names.items():
        value = fields.get(called)
        if value is None:
            continue
        if name == "top_k" and type(value) is int and value >= -1:
            # -1 and 0 keep all.
            found[name] = max(value, 0)
        elif name != "top_k" and type(value) in (int, float) and 0 <= value <= min(_MOST[name], 1e12):
            # GGUF keeps 0.6 in 32 bits, as 0.6000000238.
            found[name] = round(float(value), 6)
        else:
            kind = "a whole number, -1 or more" if name == "top_k" else "a number, 0 or more"
            upto = " and 1 at most" if _MOST[name] == 1 else ""
            raise fields.error(f"{called} is {_short(value)}, expected {kind}{upto}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError when the file is a git-lfs pointer, corrupt, or something else."""
    data = path.read_bytes()
    refuse_lfs_pointer(path, data)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected an object. Download it again.")
    return value


def hugging_face_config(config: ModelConfig, *, mxfp4: bool) -> dict[str, Any]:
    """What config.json says in the Hugging Face layout, spelled as in the published repositories."""
    layers = range(config.num_layers)
    fields: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": config.stop_token_ids[0] if config.stop_token_ids else None,
        "experts_per_token": config.num_active_experts,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": config.rope.original_context,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_types": [FULL_ATTENTION if config.window(i) is None else SLIDING_ATTENTION for i in layers],
        "max_position_embeddings": config.max_context,
        "model_type": "gpt_oss",
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.num_active_experts,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_local_experts": config.num_experts,
        "output_router_logits": False,
        "pad_token_id": config.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": config.rope.beta_fast,
            "beta_slow": config.rope.beta_slow,
            "factor": config.rope.factor,
            "original_max_position_embeddings": config.rope.original_context,
            "rope_type": "yarn",
            "truncate": config.rope.truncate,
        },
        "rope_theta": config.rope.theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if mxfp4:
        dense = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        fields["quantization_config"] = {"modules_to_not_convert": dense, "quant_method": "mxfp4"}
    return fields


def original_config(config: ModelConfig) -> dict[str, Any]:
    """What config.json says in the original/ folder of a published repository."""
    return {
        "num_hidden_layers": config.num_layers,
        "num_experts": config.num_experts,
        "experts_per_token": config.num_active_experts,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": config.rope.original_context,
        "rope_theta": config.rope.theta,
        "rope_scaling_factor": config.rope.factor,
        "rope_ntk_alpha": config.rope.beta_slow,
        "rope_ntk_beta": config.rope.beta_fast,
    }


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """What generation_config.json says."""
    return {
        "do_sample": True,
        "eos_token_id": list(config.stop_token_ids),
        "pad_token_id": config.pad_token_id,
    }


class Fields:
    """Settings that are asked for by name; the first name that is there counts. ``remedy`` ends every complaint."""

    def __init__(self, path: Path, values: dict[str, Any], within: str = "", remedy: str = CONFIG_REMEDY) -> None:
        self.path = path
        self.values = values
        self.within = within
        self.remedy = remedy

    def get(self, *names: str) -> Any:
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def integer(self, *names: str, default: int | None = None) -> int:
        value = self._required(names, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not 0 < value < 1e12:
            raise self.error(f"{self.within}{names[0]} is {_short(value)}, expected a whole number above 0")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        value = self._required(names, default)
        if type(value) not in (int, float) or not 0 < value < 1e12:
            raise self.error(f"{self.within}{names[0]} is {value!r}, expected a number above 0 and below 1e12")
        return float(value)

    def must_be(self, name: str, expected: Any, why: str) -> None:
        """Refuse a field that is there and says something else."""
        value = self.get(name)
        try:
            same = math.isclose(value, expected, rel_tol=1e-6) if _both_numbers(value, expected) else value == expected
        except OverflowError:
            same = False
        if value is not None and not same:
            raise self.error(f"{self.within}{name} is {_short(value)}, expected {expected!r}: {why}")

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}. {self.remedy}")

    def _required(self, names: tuple[str, ...], default: float | None) -> Any:
        value = self.get(*names)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"the field {self.within}{' or '.join(names)} is missing")
        return value


def _short(value: object) -> str:
    """A value in an error: Python writes out no number of thousands of digits."""
    return "too large a number" if isinstance(value, int) and value.bit_length() > 4096 else repr(value)[:200]


def _both_numbers(a: Any, b: Any) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))


def _refuse_other_architectures(fields: Fields) -> None:
    # The original layout says neither of these.
    model_type = fields.get("model_type")
    if model_type is not None and model_type != "gpt_oss":
        raise CheckpointError(
            f"{fields.path}: this is a model of type {model_type!r}; ossia runs gpt-oss models (model_type 'gpt_oss') "
            "alone. Choose for example gpt-oss-20b."
        )
    quantization = fields.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") != "mxfp4":
        raise CheckpointError(
            f"{fields.path}: the weights are quantised by {quantization.get('quant_method')!r}; ossia reads MXFP4, "
            "bfloat16, float16 and float32 weights. Choose a checkpoint in one of these."
        )
    fields.must_be("hidden_act", "silu", "gpt-oss has no other activation")
    fields.must_be("attention_bias", True, "the attention of gpt-oss has biases")
    fields.must_be("tie_word_embeddings", False, "gpt-oss has an unembedding of its own")
    fields.must_be("swiglu_alpha", SWIGLU_ALPHA, "gpt-oss has no other gate")


def _rope(fields: Fields) -> RopeConfig:
    scaling_name = next((name for name in ("rope_parameters", "rope_scaling") if fields.get(name) is not None), None)
    if scaling_name is None:
        return _original_rope(fields)
    values = fields.get(scaling_name)
    if not isinstance(values, dict):
        raise fields.error(f"{scaling_name} is {values!r}, expected an object")
    scaling = Fields(fields.path, values, f"{scaling_name}.")
    theta = scaling.number("rope_theta", default=fields.number("rope_theta", default=_DEFAULTS.rope.theta))
    rope_type = scaling.get("rope_type", "type") or "default"
    if rope_type == "default":
        return RopeConfig(theta, factor=1.0, original_context=fields.integer("max_position_embeddings"))
    if rope_type != "yarn":
        raise fields.error(f"{scaling_name}.rope_type is {rope_type!r}, expected 'yarn' or 'default'")
    rope = RopeConfig(
        theta=theta,
        factor=scaling.number("factor"),
        original_context=scaling.integer(
            "original_max_position_embeddings", default=fields.get("initial_context_length")
        ),
        beta_fast=scaling.number("beta_fast", default=_DEFAULTS.rope.beta_fast),
        beta_slow=scaling.number("beta_slow", default=_DEFAULTS.rope.beta_slow),
        # transformers truncates unless told not to, and the published files tell it.
        truncate=scaling.get("truncate") is not False,
    )
    scaling.must_be("attention_factor", rope.concentration, "gpt-oss has YaRN's own factor")
    scaling.must_be("partial_rotary_factor", 1.0, "gpt-oss rotates whole heads")
    return rope


def _original_rope(fields: Fields) -> RopeConfig:
    # Also for a Hugging Face config that is silent about scaling: transformers then assumes the published values.
    default = _DEFAULTS.rope
    return RopeConfig(
        theta=fields.number("rope_theta", default=default.theta),
        factor=fields.number("rope_scaling_factor", default=default.factor),
        original_context=fields.integer("initial_context_length", default=default.original_context),
        beta_fast=fields.number("rope_ntk_beta", default=default.beta_fast),
        beta_slow=fields.number("rope_ntk_alpha", default=default.beta_slow),
    )


def _layer_types(fields: Fields, num_layers: int) -> tuple[str, ...]:
    kinds = fields.get("layer_types")
    if kinds is None:
        return ()
    if not isinstance(kinds, list) or not all(kind in (FULL_ATTENTION, SLIDING_ATTENTION) for kind in kinds):
        raise fields.error(f"layer_types is {kinds!r}, expected a list of '{FULL_ATTENTION}' and '{SLIDING_ATTENTION}'")
    if len(kinds) != num_layers:
        raise fields.error(f"layer_types names {len(kinds)} layers, num_hidden_layers is {num_layers}")
    return tuple(kinds)


def _stop_token_ids(generation: Fields, fields: Fields, vocab_size: int) -> tuple[int, ...]:
    ids: list[int] = []
    for source in (generation, fields):
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise source.error(f"eos_token_id is {value!r}, expected token ids from 0 to {vocab_size - 1}")
            ids.append(token_id)
    # The original layout names none.
    return tuple(dict.fromkeys(ids)) or tuple(i for i in _DEFAULTS.stop_token_ids if i < vocab_size)


def _pad_token_id(generation: Fields, fields: Fields, vocab_size: int) -> int | None:
    value = next((x for source in (fields, generation) if type(x := source.get("pad_token_id")) is int), None)
    return value if value is None or 0 <= value < vocab_size else None


def check_consistency(fields: Fields, config: ModelConfig) -> None:
    """Raise CheckpointError when sizes contradict each other."""
    if config.num_heads % config.num_kv_heads:
        raise fields.error(
            f"num_attention_heads {config.num_heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise fields.error(f"head_dim {config.head_dim} is odd")
    if config.rope.theta <= 1:
        raise fields.error(f"rope_theta is {config.rope.theta}, expected a number above 1")
    if config.num_active_experts > config.num_experts:
        raise fields.error(f"num_experts_per_tok {config.num_active_experts} exceeds the {config.num_experts} experts")
