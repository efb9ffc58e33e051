"""config.json in every spelling that has been published, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ossia.errors import CheckpointError
from ossia.model.config import FULL_ATTENTION, SLIDING_ATTENTION, ModelConfig, RopeConfig
from ossia.model.config_file import (
    generation_config,
    hugging_face_config,
    original_config,
    read_config,
    read_sampling,
)

PUBLISHED = ModelConfig(layer_types=(SLIDING_ATTENTION, FULL_ATTENTION) * 12)
YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}


@pytest.fixture
def read(tmp_path):
    """read(config, generation=None): what `read_config` makes of these two files."""

    def run(config: Any, generation: Any = None) -> ModelConfig:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return read_config(tmp_path)

    return run


def published(**changes: Any) -> dict[str, Any]:
    """The published config.json with fields changed; None takes a field away."""
    config = hugging_face_config(PUBLISHED, mxfp4=True) | changes
    return {name: value for name, value in config.items() if value is not None}


def test_the_published_spelling_is_read(read):
    assert read(published(), generation_config(PUBLISHED)) == PUBLISHED


def test_the_original_spelling_is_read(read):
    assert read(original_config(ModelConfig())) == ModelConfig(pad_token_id=None)


def test_the_spelling_of_transformers_5_is_read(read):
    config = published(rope_scaling=None, rope_theta=None, rope_parameters=YARN | {"rope_theta": 1234.0})
    assert read(config).rope == RopeConfig(theta=1234.0)


def test_rope_theta_may_stand_outside(read):
    assert read(published(rope_theta=1234)).rope.theta == 1234.0


def test_without_scaling_the_published_values_hold_as_in_transformers(read):
    assert read(published(rope_scaling=None)).rope == RopeConfig()


def test_plain_rope_has_factor_one(read):
    config = published(rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert read(config).rope == RopeConfig(theta=500.0, factor=1.0, original_context=131_072)


def test_truncation_is_on_unless_the_file_says_no_as_in_transformers(read):
    scaling = {name: value for name, value in YARN.items() if name != "truncate"}
    assert read(published(rope_scaling=scaling)).rope.truncate


def test_an_older_name_of_the_rope_type_is_read(read):
    scaling = {name: value for name, value in YARN.items() if name != "rope_type"} | {"type": "yarn"}
    assert read(published(rope_scaling=scaling)).rope == RopeConfig()


def test_the_original_context_may_stand_outside_the_scaling(read):
    scaling = {name: value for name, value in YARN.items() if name != "original_max_position_embeddings"}
    assert read(published(rope_scaling=scaling, initial_context_length=2048)).rope.original_context == 2048


def test_layer_types_may_be_missing(read):
    config = read(published(layer_types=None))
    assert [config.window(i) for i in range(4)] == [128, None, 128, None]


def test_layer_types_are_followed(read):
    config = read(published(layer_types=[FULL_ATTENTION, SLIDING_ATTENTION] * 12))
    assert [config.window(i) for i in range(4)] == [None, 128, None, 128]


def test_experts_are_counted_under_either_name(read):
    config = published(num_local_experts=None, num_experts=16, num_experts_per_tok=None, experts_per_token=2)
    assert (read(config).num_experts, read(config).num_active_experts) == (16, 2)


@pytest.mark.parametrize(
    ("eos", "generation", "want"),
    [
        (200002, {"eos_token_id": [200002, 199999, 200012]}, (200002, 199999, 200012)),
        ([5, 6], None, (5, 6)),
        (7, None, (7,)),
        (7, {"eos_token_id": 8}, (8, 7)),
        (None, {}, (200002, 199999, 200012)),
    ],
)
def test_stop_tokens_come_from_both_files_as_number_or_list(eos, generation, want, read):
    assert read(published(eos_token_id=eos), generation).stop_token_ids == want


def test_default_stop_tokens_outside_a_small_vocabulary_are_left_out(read):
    config = read(original_config(ModelConfig(vocab_size=300)))
    assert config.stop_token_ids == () and config.pad_token_id is None


def test_what_is_written_is_read_back_for_any_model(read):
    config = ModelConfig(
        num_layers=3,
        hidden_size=64,
        vocab_size=300,
        num_experts=8,
        num_active_experts=2,
        sliding_window=7,
        layer_types=(FULL_ATTENTION, SLIDING_ATTENTION, FULL_ATTENTION),
        max_context=500,
        rms_norm_eps=1e-6,
        swiglu_limit=5.0,
        rope=RopeConfig(theta=99.0, factor=4.0, original_context=125, beta_fast=16.0, beta_slow=2.0, truncate=True),
        stop_token_ids=(2, 3),
        pad_token_id=0,
    )
    assert read(hugging_face_config(config, mxfp4=False), generation_config(config)) == config


FAULTS = {
    "another architecture": (published(model_type="llama"), ["'llama'", "gpt_oss"]),
    "another quantisation": (published(quantization_config={"quant_method": "bitsandbytes"}), ["'bitsandbytes'"]),
    "another activation": (published(hidden_act="gelu"), ["hidden_act is 'gelu'", "'silu'"]),
    "no biases": (published(attention_bias=False), ["attention_bias is False"]),
    "a tied unembedding": (published(tie_word_embeddings=True), ["tie_word_embeddings is True"]),
    "another gate": (published(swiglu_alpha=1.5), ["swiglu_alpha is 1.5", "1.702"]),
    "another rope": (published(rope_scaling=YARN | {"rope_type": "llama3"}), ["rope_scaling.rope_type is 'llama3'"]),
    "another attention factor": (
        published(rope_scaling=YARN | {"attention_factor": 2.0}),
        ["rope_scaling.attention_factor is 2.0"],
    ),
    "no factor": (published(rope_scaling={"rope_type": "yarn"}), ["field rope_scaling.factor is missing"]),
    "a scaling that is no object": (published(rope_scaling=3), ["rope_scaling is 3"]),
    "a missing field": (published(num_hidden_layers=None), ["field num_hidden_layers is missing"]),
    "a field missing under both names": (
        published(num_local_experts=None),
        ["field num_local_experts or num_experts is missing"],
    ),
    "a text for a number": (published(hidden_size="2880"), ["hidden_size is '2880'", "whole number"]),
    "a fraction for a count": (published(hidden_size=2880.5), ["hidden_size is 2880.5"]),
    "zero layers": (published(num_hidden_layers=0), ["num_hidden_layers is 0"]),
    "true for a number": (published(rms_norm_eps=True), ["rms_norm_eps is True"]),
    "an unknown kind of layer": (published(layer_types=["linear_attention"] * 24), ["layer_types"]),
    "too few kinds of layers": (published(layer_types=[FULL_ATTENTION]), ["names 1 layers", "24"]),
    "a stop token outside the vocabulary": (published(eos_token_id=201_088), ["eos_token_id is 201088", "201087"]),
    "heads that do not divide": (published(num_key_value_heads=7), ["num_attention_heads 64", "num_key_value_heads 7"]),
    "an odd head": (published(head_dim=63), ["head_dim 63 is odd"]),
    "pairs that all turn alike": (published(rope_theta=1.0), ["rope_theta is 1.0", "above 1"]),
    "a factor out of all bounds": (
        published(rope_scaling=YARN | {"factor": 1e308}),
        ["rope_scaling.factor is 1e+308", "below 1e12"],
    ),
    "more active experts than experts": (published(num_experts_per_tok=33), ["33 exceeds the 32"]),
    "corrupt JSON": ('{"model_type": "gpt_oss"', ["not valid JSON"]),
    "a list": ("[]", ["holds a JSON list, expected an object"]),
    "a git-lfs pointer": ("version https://git-lfs.github.com/spec/v1\n", ["git-lfs pointer"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gives_one_error_that_names_the_file_and_the_field(fault, read, tmp_path):
    config, words = FAULTS[fault]
    with pytest.raises(CheckpointError) as caught:
        read(config)
    message = caught.value.message
    assert str(tmp_path / "config.json") in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("factor", [1.0, 32.0])
def test_a_factor_written_as_a_whole_float_and_the_usual_attention_factor_are_accepted(factor, read):
    rope = RopeConfig(factor=factor)
    scaling = YARN | {"factor": factor, "attention_factor": rope.concentration, "partial_rotary_factor": 1}
    config = read(published(rope_scaling=scaling, num_hidden_layers=24.0))
    assert config.rope == rope and config.num_layers == 24


# generation_config.json ---------------------------------------------------------------------------------------------


def sampling(tmp_path, **fields: Any) -> dict[str, float]:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(fields))
    return read_sampling(path)


def test_how_to_sample_is_what_generation_config_names_and_nothing_else(tmp_path):
    assert sampling(tmp_path, **generation_config(PUBLISHED)) == {}
    named = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0, "repetition_penalty": 1.05}
    assert sampling(tmp_path, do_sample=True, max_new_tokens=9, **named) == named
    assert sampling(tmp_path, temperature=None, top_k=-1) == {"top_k": 0}
    assert sampling(tmp_path, do_sample=False, top_p=0.9) == {"temperature": 0, "top_p": 0.9}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", -1, "a number, 0 or more"),
        ("temperature", "hot", "a number, 0 or more"),
        ("temperature", True, "a number, 0 or more"),
        ("top_p", 1.5, "and 1 at most"),
        ("top_k", 2.5, "a whole number, -1 or more"),
    ],
)
def test_a_number_that_nothing_can_be_sampled_by_is_named(tmp_path, field, value, expected):
    with pytest.raises(CheckpointError, match=rf"generation_config.json: {field} is {value!r}, expected .*{expected}"):
        sampling(tmp_path, **{field: value})
