"""Every setting that a user can turn, so that a new one is a decision."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from ossia.engine import EngineConfig, SamplingParams
from ossia.tools.browser import BrowserRules
from ossia.tools.web.fetch import FetchLimits
from ossia.train.config import DataSettings, DpoConfig, SftConfig, TrainConfig
from ossia.train.data import DataConfig
from ossia.train.lora import LoraConfig
from ossia.train.pretrain import PretrainConfig
from ossia.train.rollout import RolloutConfig
from ossia.train.rollout_config import DistillConfig, RlConfig, RolloutSettings

# Of a class that others come from, or that comes from another, its own alone.
KNOBS = {
    TrainConfig: [
        "model",
        "out",
        "begin_with",
        "trainable",
        "rank",
        "expert_rank",
        "alpha",
        "dropout",
        "targets",
        "fake_quant",
        "seed",
        "epochs",
        "steps",
        "step_tokens",
        "optimizer",
        "learning_rate",
        "weight_decay",
        "beta1",
        "beta2",
        "epsilon",
        "momentum",
        "schedule",
        "warmup",
        "decay",
        "final_rate",
        "weight_mean",
        "clip",
        "router_balance",
        "max_skipped",
        "device",
        "replicate",
        "threads",
        "precision",
        "recompute",
        "save_every",
        "keep",
        "eval_every",
        "patience",
        "tensorboard",
        "wandb",
    ],
    DataSettings: [
        "data",
        "validation",
        "validation_share",
        "eval_tokens",
        "format",
        "train",
        "turns",
        "effort",
        "current_date",
        "max_tokens",
        "pass_tokens",
        "overlong",
        "packing",
        "skip_bad_rows",
        "buffer_rows",
        "prompts",
        "prompt_tokens",
    ],
    SftConfig: [],
    DpoConfig: [
        "beta",
        "smoothing",
        "sft_weight",
    ],
    RolloutSettings: [
        "task",
        "task_option",
        "efforts",
        "prompts",
        "group",
        "rollout_tokens",
        "max_calls",
        "tool_seconds",
        "temperature",
        "grammar",
        "python_sandbox",
        "unsafe_python",
        "max_python",
        "show_rollouts",
        "pass_tokens",
        "eval_prompts",
        "backend",
        "dense",
        "kv",
        "kv_memory",
        "concurrent",
        "replay",
    ],
    RlConfig: [
        "steps",
        "advantage",
        "average",
        "ratio",
        "clip_low",
        "clip_high",
        "updates",
        "reuse",
        "redraws",
        "correction",
        "correction_cap",
        "kl",
        "length_cost",
        "overlong",
        "drop_truncated",
    ],
    DistillConfig: [
        "steps",
        "task",
        "teacher",
        "teacher_model",
        "teacher_key",
        "method",
        "teachings",
        "samples",
        "shard",
        "top",
        "collect_only",
        "min_reward",
        "estimate",
    ],
    PretrainConfig: [
        "tasks",
        "efforts",
        "learn",
        "turns",
        "mixed",
        "pondering",
        "idle_tools",
        "language",
        "facts",
        "brief",
        "evenness",
        "teacher",
        "teacher_share",
        "hardest",
        "growth",
        "pass_tokens",
        "max_tokens",
        "held_out",
    ],
    LoraConfig: [
        "rank",
        "alpha",
        "targets",
        "expert_rank",
        "dropout",
        "layers",
    ],
    RolloutConfig: [
        "max_tokens",
        "max_calls",
        "tool_timeout_s",
        "temperature",
        "grammar",
        "python_sandbox",
        "unsafe_python",
        "max_python",
    ],
    DataConfig: [
        "format",
        "train",
        "turns",
        "effort",
        "current_date",
        "drop_analysis",
        "max_tokens",
        "overlong",
        "skip_bad_rows",
        "validation_share",
        "split",
        "buffer_rows",
        "shuffle",
        "packing",
        "seed",
    ],
    BrowserRules: ["domains", "seen_links_only", "obeys_robots", "max_requests", "max_state_bytes"],
    FetchLimits: ["total_s", "max_bytes", "max_redirects"],
    EngineConfig: [
        "kv_memory_bytes",
        "block_size",
        "max_batch_tokens",
        "max_num_seqs",
        "max_context",
        "adapter_memory_bytes",
        "draft_tokens",
        "record_routing",
    ],
    SamplingParams: [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "banned_token_ids",
        "seed",
        "logprobs",
        "top_logprobs",
        "score_from",
        "drawn_logprobs",
        "routing",
        "max_tokens",
        "min_tokens",
        "stop_token_ids",
        "stop_sequences",
        "stop_strings",
        "ignore_eos",
        "adapter",
        "constraint",
    ],
}


def own_fields(settings: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(settings) if field.name in settings.__annotations__]


def with_subclasses(settings: type) -> set[str]:
    return {settings.__name__}.union(*(with_subclasses(one) for one in settings.__subclasses__()))


@pytest.mark.parametrize("settings", KNOBS, ids=lambda one: one.__name__)
def test_the_settings_are_these_and_no_others(settings):
    assert [field.name for field in own_fields(settings)] == KNOBS[settings]


def test_every_method_of_training_has_its_settings_here():
    assert with_subclasses(TrainConfig) <= {settings.__name__ for settings in KNOBS}


@pytest.mark.parametrize("settings", KNOBS, ids=lambda one: one.__name__)
def test_every_setting_has_a_sentence(settings):
    lines = [line.strip() for line in inspect.getsource(settings).splitlines()]
    for field in own_fields(settings):
        text = field.metadata.get("text")
        if text is None:
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}:"))
            assert lines[at - 1].startswith("#"), field.name
            text = lines[at - 1]
        assert text.endswith(".") and len(text) >= 15, field.name
