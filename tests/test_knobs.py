"""Every setting that a user can turn, so that a new one is a decision."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from ossia.engine import EngineConfig, SamplingParams
from ossia.tools.browser import BrowserRules
from ossia.tools.web.fetch import FetchLimits
from ossia.train.data import DataConfig

KNOBS = {
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


@pytest.mark.parametrize("settings", KNOBS, ids=lambda one: one.__name__)
def test_the_settings_are_these_and_no_others(settings):
    assert [field.name for field in dataclasses.fields(settings)] == KNOBS[settings]


@pytest.mark.parametrize("settings", KNOBS, ids=lambda one: one.__name__)
def test_every_setting_has_a_sentence(settings):
    lines = [line.strip() for line in inspect.getsource(settings).splitlines()]
    for name in KNOBS[settings]:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
        assert lines[at - 1].startswith("#") and lines[at - 1].endswith("."), name
