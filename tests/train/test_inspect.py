"""What an inspection counts is what training would read, and it never ends at a bad row."""

from __future__ import annotations

import json

import pytest
from tests.train import scripts
from tests.train.scripts import write_rows

from ossia.harmony import Tokenizer
from ossia.train.data import DataConfig, read_samples
from ossia.train.inspect import inspect_data
from ossia.train.packing import plan

CONFIG = DataConfig(current_date="2025-06-28", max_tokens=0, shuffle=False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.o200k_harmony()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made = [scripts.openai(scripts.script(seed)) for seed in range(40)]
    return write_rows(tmp_path_factory.mktemp("inspect") / "rows.jsonl", [*made, *made[:3]])


def test_the_counts_are_those_of_what_is_read(rows, tokenizer):
    samples = list(read_samples(rows, CONFIG, tokenizer))
    found = inspect_data(rows, CONFIG, tokenizer, batch_tokens=2048)
    lengths = [len(sample) for sample in samples]
    assert (found.rows, found.samples, found.tokens) == (43, len(samples), sum(lengths))
    assert found.trained_tokens == sum(sample.num_trained for sample in samples) == sum(found.trained.values())
    assert found.trained_tokens + sum(found.untrained.values()) == found.tokens
    assert set(found.trained) == {"analysis", "commentary", "final", "call"}
    assert set(found.untrained) == {"system", "developer", "user", "assistant", "tool"}
    assert sum(found.efforts.values()) == sum(found.length_histogram.values()) == found.samples
    assert (found.length_percentiles["shortest"], found.length_percentiles["longest"]) == (min(lengths), max(lengths))
    for bound, num in found.length_histogram.items():
        assert num == sum(bound // 2 < length <= bound for length in lengths)
    packs = plan(lengths, 2048)
    assert found.packing is not None and found.packing.packs == len(packs)
    assert found.packing.efficiency == pytest.approx(sum(lengths) / (2048 * len(packs)))
    assert found.duplicate_rows == 3 and found.formats == {"openai": 1} and found.kind == "samples"
    assert not found.problems and not found.warnings


def test_samples_that_are_too_long_are_counted_with_their_lengths(rows, tokenizer):
    found = inspect_data(rows, DataConfig(max_tokens=300), tokenizer)
    assert found.too_long == sum(len(s) > 300 for s in read_samples(rows, DataConfig(max_tokens=0), tokenizer))
    assert found.length_percentiles["longest"] > 300 and found.packing is not None
    assert found.packing.max_tokens == 300


def test_shown_samples_are_whole_and_cut_by_message_and_weight(rows, tokenizer):
    samples = list(read_samples(rows, CONFIG, tokenizer))
    found = inspect_data(rows, CONFIG, tokenizer, num_shown_rows=3)
    assert len({one.line for one in found.shown}) == 3
    for shown, sample in zip(found.shown, samples, strict=False):
        assert [i for run in shown.runs for i in run.token_ids] == sample.token_ids_L.tolist()
        weights = [run.weight for run in shown.runs for _ in run.token_ids]
        assert weights == sample.weights_L.tolist()
    named = inspect_data(rows, CONFIG, tokenizer, line=7)
    assert {one.line for one in named.shown} == {7}


def test_bad_rows_are_listed_and_the_others_counted(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": 3}, scripts.openai(scripts.script(1))])
    with path.open("ab") as file:
        file.write(b"{\n\xff\n")
    found = inspect_data(path, CONFIG, tokenizer)
    assert (found.rows, found.bad_rows) == (4, 3) and found.samples
    assert [problem.rpartition("a.jsonl:")[2][:2] for problem in found.problems] == ["1:", "3:", "4:"]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert inspect_data(empty, CONFIG, tokenizer).problems == [
        f"{empty}:0: the file is empty; expected a JSON object on each line"
    ]


def test_what_deserves_a_look_is_said(tmp_path, tokenizer):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "not json"}}
    messages = [
        {"role": "user", "content": "a", "mood": "good"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "b"},
        {"role": "assistant", "content": "hm</think>b"},
        {"role": "user", "content": "c"},
    ]
    found = inspect_data(write_rows(tmp_path / "a.jsonl", [{"messages": messages}]), CONFIG, tokenizer)
    said = "\n".join(found.warnings)
    for part in (
        "do not declare: functions.f",
        "no JSON object",
        "</think>",
        "no answer follows",
        "mood (1)",
        "no thoughts",
    ):
        assert part in said
    assert found.tools_called == {"functions.f": 1}


def test_pairs_are_inspected_as_pairs(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": f"{i}", "chosen": "yes", "rejected": "no"} for i in range(4)])
    found = inspect_data(path, CONFIG, tokenizer, batch_tokens=1000)
    assert found.kind == "pairs" and found.samples == 8
    assert [one.which for one in found.shown] == ["chosen", "rejected"]
    assert json.dumps(found.efforts)
