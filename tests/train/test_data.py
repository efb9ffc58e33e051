"""A sample is what inference renders and samples, token for token, in every format; masks end where the model stops."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.harmony.test_against_openai_harmony import their_conversation
from tests.train import scripts
from tests.train.scripts import write_rows

from ossia.errors import ConfigError, InputError
from ossia.harmony import (
    Channel,
    Conversation,
    Message,
    Role,
    StreamParser,
    Tokenizer,
    render_for_completion,
    render_for_training,
    render_message,
)
from ossia.responses.convert import History, TurnMemory
from ossia.responses.loop import prepare
from ossia.responses.seal import Seal
from ossia.server.chat import ChatRequest, to_response_request
from ossia.train.data import DataConfig, ReadReport, Sample, read_pairs, read_samples

DATE = "2025-06-28"
CONFIG = DataConfig(current_date=DATE, max_tokens=0)
SEEDS = range(40)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.o200k_harmony()


@pytest.fixture
def read(tmp_path, tokenizer):
    def read(rows, config=CONFIG, **options):
        return list(read_samples(write_rows(tmp_path / "rows.jsonl", rows), config, tokenizer, **options))

    return read


def trained(sample: Sample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(sample.token_ids_L[sample.weights_L > 0].tolist())


def whole(sample: Sample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(sample.token_ids_L.tolist())


def chat(*messages: tuple[str, str], **fields) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **fields}


def assert_equal(ours: list[Sample], theirs: list[Sample]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.token_ids_L.tolist() == b.token_ids_L.tolist()
        assert a.weights_L.tolist() == b.weights_L.tolist()
        assert a.effort == b.effort


# -- formats agree -------------------------------------------------------------------------------------------------


def test_one_conversation_in_three_formats_gives_equal_samples(read):
    for seed in SEEDS:
        script = scripts.script(seed)
        ours = read([scripts.openai(script)])
        assert ours
        assert_equal(ours, read([scripts.sharegpt(script)]))
        assert_equal(ours, read([scripts.harmony(script, DATE)]))


# -- samples are what inference sees -------------------------------------------------------------------------------


def server_prompt(row: dict, tokenizer: Tokenizer) -> list[int]:
    """The prompt that the server renders for a chat request."""
    model = SimpleNamespace(seal=Seal.ephemeral(), memory=TurnMemory(), tokenizer=tokenizer, today=lambda: DATE)
    return prepare(to_response_request(ChatRequest(**row)), model, History()).prompt.token_ids


def test_a_sample_is_the_servers_prompt_and_what_the_model_samples_at_each_of_its_steps(read, tokenizer):
    num_steps = 0
    for seed in SEEDS:
        script = scripts.script(seed)
        row = scripts.openai(script)
        samples = read([row])
        assert len(samples) == len(script.turns)
        asked = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        turn = 0
        for i in asked:
            prompt = server_prompt({**row, "messages": row["messages"][:i]}, tokenizer)
            sample = samples[turn]
            token_ids = sample.token_ids_L.tolist()
            assert token_ids[: len(prompt)] == prompt
            sampled = token_ids[len(prompt) : next_stop(token_ids, len(prompt), tokenizer) + 1]
            assert sample.weights_L[len(prompt) : len(prompt) + len(sampled)].all()
            assert said_in(sampled, tokenizer) == told_by(row["messages"][i])
            num_steps += 1
            if "tool_calls" not in row["messages"][i]:
                assert len(prompt) + len(sampled) == len(token_ids)
                # What is sampled at the steps of the turn is trained, and nothing else.
                turn += 1
        assert turn == len(samples)
    assert num_steps > 100


def test_in_any_order_of_messages_each_answer_is_trained_once_behind_the_servers_prompt(read, tokenizer):
    num = 0
    for seed in range(150):
        row = {"messages": scripts.jumble(seed)}
        said = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        samples = read([row])
        for i in said:
            prompt = server_prompt({"messages": row["messages"][:i]}, tokenizer)
            starts = [
                sample.token_ids_L.tolist()
                for sample in samples
                if sample.token_ids_L.tolist()[: len(prompt)] == prompt and sample.weights_L[len(prompt)] > 0
            ]
            assert len(starts) == 1
            sampled = starts[0][len(prompt) : next_stop(starts[0], len(prompt), tokenizer) + 1]
            assert said_in(sampled, tokenizer) == told_by(row["messages"][i])
            num += 1
        trained_messages = sum(trained(sample, tokenizer).count("<|message|>") for sample in samples)
        assert trained_messages == sum(len(told_by(row["messages"][i])) for i in said)
    assert num > 400


@pytest.mark.parametrize("drop", ["past_turns", "harmony", "never"])
def test_under_every_rule_for_thoughts_each_step_is_trained_once_behind_its_prompt(read, tokenizer, drop):
    num, num_samples = 0, 0
    for seed in SEEDS:
        row = scripts.harmony(scripts.script(seed), DATE)
        messages = Conversation.from_dict(row).messages
        samples = read([row], DataConfig(current_date=DATE, max_tokens=0, drop_analysis=drop))
        num_samples += len(samples)
        for i in range(1, len(messages)):
            before = messages[i - 1]
            if messages[i].role is Role.ASSISTANT and before.role is not Role.ASSISTANT:
                prompt = render_for_completion(messages[:i], tokenizer, drop_analysis=drop)
                found = [s for s in samples if s.token_ids_L.tolist()[: len(prompt)] == prompt]
                assert [sample.weights_L[len(prompt)] for sample in found if sample.weights_L[len(prompt)] > 0] == [1]
                num += 1
        assert sum(sample.num_trained for sample in samples) == sum(
            len(render_message(message, tokenizer)) - (2 if i and messages[i - 1].role is not Role.ASSISTANT else 0)
            for i, message in enumerate(messages)
            if message.role is Role.ASSISTANT
        )
    assert num > 100
    # openai-harmony's rule shows thoughts of earlier turns again once a tool has answered: such a step begins anew.
    assert (num_samples > sum(len(scripts.script(seed).turns) for seed in SEEDS)) == (drop == "harmony")


def test_functions_that_are_declared_later_change_the_prompt_from_there_on(read, tokenizer):
    tools = {"tools": [{"name": "functions", "tools": [{"name": "f"}]}]}
    call = {"role": "assistant", "channel": "commentary", "recipient": "functions.f", "content": "{}"}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "channel": "commentary", "content": "wait"},
        {"role": "developer", "content": tools},
        call,
    ]
    first, second = (whole(sample, tokenizer) for sample in read([{"messages": messages}]))
    assert "commentary channel: 'functions'" not in first and "commentary channel: 'functions'" in second


def next_stop(token_ids: list[int], start: int, tokenizer: Tokenizer) -> int:
    return next(i for i in range(start, len(token_ids)) if token_ids[i] in tokenizer.stop_ids)


def said_in(sampled: list[int], tokenizer: Tokenizer) -> list[tuple[str | None, str | None, str]]:
    parser = StreamParser(tokenizer, strict=True)
    parser.feed_all(sampled)
    parser.close()
    assert parser.messages[-1].stop in ("<|return|>", "<|call|>")
    return [(m.channel, m.recipient, m.text) for m in parser.messages]


def told_by(message: dict) -> list[tuple[str | None, str | None, str]]:
    calls = message.get("tool_calls") or []
    out = []
    if thoughts := next((message[k] for k in ("reasoning", "reasoning_content", "thinking") if k in message), ""):
        out.append(("analysis", None, thoughts))
    if message["content"]:
        out.append(("commentary" if calls else "final", None, message["content"]))
    return out + [("commentary", f"functions.{c['function']['name']}", c["function"]["arguments"]) for c in calls]


def test_all_that_the_model_samples_is_trained_once_and_nothing_else(read, tokenizer):
    for seed in SEEDS:
        script = scripts.script(seed)
        texts = []
        for sample in read([scripts.openai(script)]):
            parts = trained(sample, tokenizer)
            texts.append(parts)
        for turn, text in zip(script.turns, texts, strict=True):
            expected = ""
            opens = False

            def say(header, content, stop, expected, opens):
                return expected + ("<|start|>assistant" if opens else "") + header + "<|message|>" + content + stop

            for step in turn.steps:
                for channel, content in (("analysis", step.thoughts), ("commentary", step.preamble)):
                    if content:
                        expected = say(f"<|channel|>{channel}", content, "<|end|>", expected, opens)
                        opens = True
                header = f" to=functions.{step.name}<|channel|>commentary <|constrain|>json"
                expected = say(header, step.arguments, "<|call|>", expected, opens)
                opens = False
            if turn.thoughts:
                expected = say("<|channel|>analysis", turn.thoughts, "<|end|>", expected, opens)
                opens = True
            assert text == say("<|channel|>final", turn.answer, "<|return|>", expected, opens)


@pytest.mark.parametrize(
    "train", ["all", "final", "analysis,final", "calls", "commentary", "all,analysis=0", "analysis"]
)
def test_the_last_trained_token_is_return_call_or_end(read, tokenizer, train):
    stops = {tokenizer.special(name) for name in ("<|return|>", "<|call|>", "<|end|>")}
    config = DataConfig(current_date=DATE, max_tokens=0, train=train)
    num = 0
    for seed in SEEDS:
        for sample in read([scripts.openai(scripts.script(seed))], config):
            assert sample.token_ids_L[np.flatnonzero(sample.weights_L)[-1]] in stops
            assert sample.weights_L[0] == 0
            num += 1
            # Every trained stretch ends where the model stops or a message of its own ends.
            edges = np.flatnonzero((sample.weights_L[:-1] > 0) & (sample.weights_L[1:] == 0))
            assert set(sample.token_ids_L[edges].tolist()) <= stops
    assert num > 10


def test_thoughts_of_earlier_turns_are_dropped_and_those_of_the_turn_are_kept(read, tokenizer):
    row = {
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "reasoning": "FIRST", "content": "1"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "reasoning": "SECOND", "content": "2"},
        ]
    }
    first, second = (whole(sample, tokenizer) for sample in read([row]))
    assert "FIRST" in first and "SECOND" not in first
    assert "FIRST" not in second and "SECOND" in second
    assert "<|channel|>final<|message|>1<|return|>" in first
    assert "<|channel|>final<|message|>1<|end|>" in second
    never = read([row], DataConfig(current_date=DATE, drop_analysis="never"))
    assert "FIRST" in whole(never[1], tokenizer)


def test_only_the_last_turn_is_read_where_that_is_asked(read, tokenizer):
    row = chat(("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2"))
    (only,) = read([row], DataConfig(turns="last"))
    assert trained(only, tokenizer) == "<|channel|>final<|message|>2<|return|>"


def test_two_answers_in_a_row_are_two_samples(read, tokenizer):
    samples = read([chat(("user", "go"), ("assistant", "1"), ("assistant", "2"))])
    assert [trained(s, tokenizer) for s in samples] == [f"<|channel|>final<|message|>{n}<|return|>" for n in (1, 2)]


def test_calls_of_one_message_are_each_followed_by_their_result(read, tokenizer):
    calls = [{"id": n, "type": "function", "function": {"name": n, "arguments": "{}"}} for n in ("a", "b")]
    together = [{"role": "assistant", "tool_calls": calls}]
    results = [{"role": "tool", "tool_call_id": n, "content": f"result {n}"} for n in ("b", "a")]
    ask, end = {"role": "user", "content": "go"}, {"role": "assistant", "content": "done"}
    apart = [
        one for i, n in enumerate("ab") for one in ({"role": "assistant", "tool_calls": [calls[i]]}, results[1 - i])
    ]
    assert_equal(read([{"messages": [ask, *together, *results, end]}]), read([{"messages": [ask, *apart, end]}]))


def test_harmony_rows_with_trained_tools_keep_the_turns_thoughts(read, tokenizer):
    messages = [
        Message(Role.USER, "sum"),
        Message(Role.ASSISTANT, "I compute.", channel="analysis"),
        Message(Role.ASSISTANT, "print(1)", channel="analysis", recipient="python", content_type="code"),
        Message(Role.TOOL, "1\n", name="python", recipient="assistant", channel="analysis"),
        Message(Role.ASSISTANT, "It is 1.", channel="final"),
    ]
    (sample,) = read([{"messages": [m.to_dict() for m in messages]}])
    text = trained(sample, tokenizer)
    assert text == (
        "<|channel|>analysis<|message|>I compute.<|end|><|start|>assistant to=python<|channel|>analysis code"
        "<|message|>print(1)<|call|><|channel|>final<|message|>It is 1.<|return|>"
    )
    (quiet,) = read([{"messages": [m.to_dict() for m in messages]}], DataConfig(train="all,calls:python=0"))
    assert "print" not in trained(quiet, tokenizer) and "I compute." in trained(quiet, tokenizer)


def test_a_single_turn_equals_our_renderer_for_training(read, tokenizer):
    for seed in SEEDS:
        script = scripts.script(seed)
        script.turns = script.turns[:1]
        row = scripts.harmony(script, DATE)
        (sample,) = read([row])
        rendered = render_for_training(Conversation.from_dict(row), tokenizer, drop_analysis="never")
        assert sample.token_ids_L.tolist() == rendered.token_ids
        assert (sample.weights_L > 0).tolist() == rendered.sampled_mask()


# -- what is trained -----------------------------------------------------------------------------------------------

TALK = {
    "messages": [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "reasoning": "T1",
            "content": "P1",
            "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}],
        },
        {"role": "tool", "tool_call_id": "a", "content": "R1"},
        {"role": "assistant", "reasoning": "T2", "content": "A1"},
    ]
}


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ("all", ["T1", "P1", '{"x":1}', "T2", "A1"]),
        ("final", ["A1"]),
        ("analysis,final", ["T1", "T2", "A1"]),
        ("calls", ['{"x":1}']),
        ("calls:functions.f", ['{"x":1}']),
        ("commentary", ["P1"]),
        ("all,calls:functions.*=0", ["T1", "P1", "T2", "A1"]),
        ("all=0,final", ["A1"]),
    ],
)
def test_the_setting_says_which_messages_are_trained(read, tokenizer, train, told):
    (sample,) = read([TALK], DataConfig(train=train))
    text = trained(sample, tokenizer)
    assert [one for one in ("go", "R1", "T1", "P1", '{"x":1}', "T2", "A1") if one in text] == told


def test_the_largest_weights_are_finite_together_and_one_that_is_none_in_float32_trains_nothing(read):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1e6}]}
    (sample,) = read([row | {"weight": 1e6}], DataConfig(train="all=1e6"))
    assert np.isfinite(sample.weights_L.sum()) and sample.weights_L.max() == np.float32(1e18)
    assert read([row | {"weight": 1e-60}]) == []


def test_a_weight_of_the_setting_and_of_the_message_multiply(read):
    row = {"messages": [TALK["messages"][0], {"role": "assistant", "reasoning": "T", "content": "A", "weight": 0.5}]}
    (sample,) = read([row], DataConfig(train="all,analysis=0.5"))
    assert sorted(set(sample.weights_L.tolist())) == [0.0, 0.25, 0.5]
    (double,) = read([{**row, "weight": 2}])
    assert sorted(set(double.weights_L.tolist())) == [0.0, 1.0]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_a_message_that_is_marked_is_not_trained(read, tokenizer, mark):
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1", **mark},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
    ]
    (sample,) = read([{"messages": messages}])
    assert trained(sample, tokenizer) == "<|channel|>final<|message|>2<|return|>"
    shares = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in messages]
    shares[1] |= mark
    assert_equal([sample], read([{"conversations": shares}]))


@pytest.mark.parametrize(
    "train", ["", "finals", "final:x", "calls:", "final=-1", "final=x", "final=inf", "final=1e39", "all=0"]
)
def test_a_setting_of_what_is_trained_that_is_none_is_refused(train):
    with pytest.raises(ConfigError, match="train"):
        DataConfig(train=train)


def test_a_prompt_and_its_completion_train_the_completion_alone(read, tokenizer):
    prompt = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
    ]
    (sample,) = read([{"prompt": prompt, "completion": [{"role": "assistant", "content": "2"}]}])
    assert trained(sample, tokenizer) == "<|channel|>final<|message|>2<|return|>"
    (texts,) = read([{"prompt": "two", "completion": "2"}])
    assert "<|start|>user<|message|>two<|end|>" in whole(texts, tokenizer)


# -- efforts and dates ---------------------------------------------------------------------------------------------


def test_a_rows_own_effort_stands_before_the_default(read, tokenizer):
    rows = [
        chat(("user", "a"), ("assistant", "b"), **fields)
        for fields in ({"effort": "high"}, {}, {"reasoning_effort": "minimal"})
    ]
    samples = read(rows, DataConfig(effort="medium"))
    assert [str(sample.effort) for sample in samples] == ["high", "medium", "low"]
    assert ["Reasoning: high" in whole(sample, tokenizer) for sample in samples] == [True, False, False]


def test_shares_of_efforts_are_drawn_by_the_row_alone(read):
    rows = [chat(("user", f"question {i}"), ("assistant", "b")) for i in range(400)]
    config = DataConfig(effort="low=1,high=3")
    efforts = [str(sample.effort) for sample in read(rows, config)]
    assert set(efforts) == {"low", "high"} and 60 < efforts.count("low") < 140
    assert [str(sample.effort) for sample in read(rows[::-1], config)] == efforts[::-1]


def test_rows_are_told_dates_of_the_range(read, tokenizer):
    rows = [chat(("user", f"question {i}"), ("assistant", "b")) for i in range(20)]
    dates = {
        whole(s, tokenizer).split("Current date: ")[1][:10]
        for s in read(rows, DataConfig(current_date="2025-01-01..2025-01-03"))
    }
    assert dates == {"2025-01-01", "2025-01-02", "2025-01-03"}
    assert "Current date" not in whole(read(rows, DataConfig(current_date=""))[0], tokenizer)
    (own,) = read([{**rows[0], "current_date": "2030-02-03"}])
    assert "Current date: 2030-02-03" in whole(own, tokenizer)


@pytest.mark.parametrize("effort", ["", "none", "low=x", "low=-1", "low=0"])
def test_an_effort_that_is_none_is_refused(effort):
    with pytest.raises(ConfigError, match="effort"):
        DataConfig(effort=effort)


@pytest.mark.parametrize("date", ["today", "2025-13-01", "2025-02-01..2025-01-01", "2025-01-01.."])
def test_a_date_that_is_none_is_refused(date):
    with pytest.raises(ConfigError, match="current_date"):
        DataConfig(current_date=date)


# -- too long ------------------------------------------------------------------------------------------------------


def test_a_sample_that_is_too_long_is_an_error_that_says_where_and_how_long(read):
    with pytest.raises(InputError, match=r"rows\.jsonl:1: a sample of \d+ tokens; at most 50 .*max_tokens"):
        read([chat(("user", "a"), ("assistant", "b " * 60))], DataConfig(max_tokens=50))


def test_a_sample_that_is_too_long_is_passed_by_when_that_is_said(read):
    report = ReadReport()
    rows = [chat(("user", "a"), ("assistant", "b " * 600)), chat(("user", "a"), ("assistant", "b"))]
    assert len(read(rows, DataConfig(max_tokens=200, overlong="skip"), report=report)) == 1
    assert (report.too_long, report.samples, report.rows) == (1, 1, 2)
    assert "rows.jsonl:1" in report.problems[0]


def test_cutting_leaves_out_the_oldest_turns_as_the_server_does(read, tokenizer):
    turns = [one for i in range(6) for one in (("user", f"question {i} " + "word " * 30), ("assistant", f"answer {i}"))]
    row = chat(("system", "Be brief."), *turns)
    config = DataConfig(current_date=DATE, max_tokens=200, overlong="cut")
    samples = read([row], config)
    assert [trained(s, tokenizer) for s in samples] == [
        f"<|channel|>final<|message|>answer {i}<|return|>" for i in range(6)
    ]
    assert all(len(sample) <= 200 for sample in samples)
    model = SimpleNamespace(seal=Seal.ephemeral(), memory=TurnMemory(), tokenizer=tokenizer, today=lambda: DATE)
    for i, sample in enumerate(samples):
        asked = {"messages": row["messages"][: 2 + 2 * i]}
        prompt = prepare(to_response_request(ChatRequest(**asked)), model, History()).prompt
        num_sampled = sample.num_trained
        if len(prompt.token_ids) + num_sampled > 200:
            assert prompt.shorten_until(lambda ids, room=200 - num_sampled: len(ids) <= room)
        assert sample.token_ids_L.tolist()[:-num_sampled] == prompt.token_ids


# -- bad rows ------------------------------------------------------------------------------------------------------

BAD = [
    ("[]", "expected objects with a 'role'"),
    ("3", "expected an object"),
    ("{", "no JSON"),
    ('{"a": 1}', "the fields a; expected 'messages'"),
    ('{"messages": []}', "expected objects with a 'role'"),
    ('{"messages": [3]}', "expected objects with a 'role'"),
    ('{"messages": [3, {"role": "user"}]}', r"messages\[0\] is 3; expected an object"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "nothing of the assistant's"),
    ('{"messages": [{"role": "alien", "content": "a"}]}', r"messages\[0\].role is 'alien'"),
    ('{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}', r"messages\[0\] has no content"),
    ('{"messages": [{"role": "assistant", "content": null}]}', "neither content nor tool_calls"),
    ('{"messages": [{"role": "assistant", "reasoning": "x"}]}', "only thoughts"),
    ('{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]}', "result of a call"),
    ('{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]}]}', "calls 'a b'"),
    ('{"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}', "expected a list of calls"),
    ('{"messages": [{"role": "assistant", "content": "x", "weight": "much"}]}', "weight is 'much'"),
    ('{"messages": [{"role": "assistant", "content": "x"}], "weight": 1e308}', "weight is 1e\\+308; .* to 1,000,000"),
    ('{"messages": [{"role": "assistant", "content": "x", "train": 0}]}', "train is 0; expected true or false"),
    ('{"messages": [{"role": "assistant", "content": "x", "content": "y"}]}', "'content' stands twice"),
    ('{"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]}', "reads text only"),
    ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "half a character"),
    ('{"messages": [{"role": "assistant", "content": "x"}], "effort": "huge"}', "effort is 'huge'"),
    ('{"messages": [{"role": "assistant", "content": "x"}], "tools": [{"type": "web_search"}]}', "web_search"),
    ('{"messages": [{"role": "assistant", "content": "x"}], "tools": "{"}', "expected a list of tools"),
    ('{"messages": [{"role": "assistant", "content": "x", "weight": NaN}]}', "NaN is no JSON number"),
    ('{"chosen": [{"role": "user", "content": "x"}], "rejected": []}', "two answers to choose from"),
    ('{"conversations": [{"from": "martian", "value": "x"}]}', "from is 'martian'"),
    ('{"conversations": [{"from": "function_call", "value": "f(x)"}]}', "expected JSON with a name"),
    ('{"messages": [{"role": "assistant", "channel": "secret", "content": "x"}]}', "channel is 'secret'"),
    ('{"messages": [{"role": "assistant", "channel": "final", "recipient": "f.x", "content": "x"}]}', "final channel"),
    ('{"messages": [{"role": "user", "channel": "final", "contents": "x"}]}', "has 'contents'"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_row_is_an_error_with_its_file_its_line_and_what_is_wrong(tmp_path, tokenizer, row, message):
    path = tmp_path / "bad.jsonl"
    good = json.dumps(chat(("user", "a"), ("assistant", "b")))
    path.write_text(f"\n{row}\n{good}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.jsonl:2: .*" + message):
        list(read_samples(path, DataConfig(), tokenizer))


def test_bad_rows_are_passed_by_and_counted_when_that_is_said(tmp_path, tokenizer):
    path = tmp_path / "bad.jsonl"
    good = json.dumps(chat(("user", "a"), ("assistant", "b")))
    # Rows of other formats are bad in this file.
    path.write_text("\n".join([good, *(row for row, _ in BAD), good]), encoding="utf-8")
    report = ReadReport()
    samples = list(read_samples(path, DataConfig(skip_bad_rows=True), tokenizer, report=report))
    assert len(samples) == 2 and [sample.line for sample in samples] == [1, len(BAD) + 2]
    assert (report.bad_rows, report.rows) == (len(BAD), len(BAD) + 2)
    assert len(report.problems) == len(BAD) and report.problems[1].startswith(f"{path}:3: ")


def test_a_row_without_an_answer_is_not_of_another_format(read):
    script = scripts.harmony(scripts.script(0), DATE)
    report = ReadReport()
    read([script, chat(("user", "a"))], DataConfig(skip_bad_rows=True), report=report)
    assert "nothing of the assistant's" in report.problems[0]


def test_a_file_of_two_formats_is_refused(read):
    script = scripts.script(0)
    with pytest.raises(InputError, match=r":2: a row of the format sharegpt in a file .* openai"):
        read([scripts.openai(script), scripts.sharegpt(script)], DataConfig(max_tokens=0))
    with pytest.raises(InputError, match=r":2: a row of the format harmony in a file .* openai"):
        read([scripts.openai(script), scripts.harmony(script, DATE)], DataConfig(max_tokens=0))


json_leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "x", "{}", "user", "gpt"])
FIELDS = ["messages", "role", "content", "tool_calls", "function", "name", "arguments", "id", "tool_call_id", "weight"]
FIELDS += [
    "conversations",
    "from",
    "value",
    "tools",
    "type",
    "text",
    "channel",
    "recipient",
    "effort",
    "train",
    "system",
]
FIELDS += [
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "input",
    "preferred_output",
    "non_preferred_output",
    "reasoning",
]
json_value = st.recursive(
    json_leaf,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


def mutations(value):
    """The value with one of its parts replaced, at every place."""
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            for other in (None, 3, "x", [], {}, [None], True):
                yield value | {key: other}
            for inner in mutations(value[key]):
                yield value | {key: inner}
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield value[:i] + value[i + 1 :]
            for inner in mutations(one):
                yield [*value[:i], inner, *value[i + 1 :]]


@settings(derandomize=True, deadline=None, max_examples=120)
@given(rows=st.lists(json_value, min_size=1, max_size=3))
def test_whatever_json_comes_it_is_a_sample_or_a_bad_row(tmp_path_factory, tokenizer, rows):
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for format in ("auto", "harmony", "openai", "sharegpt"):
        report = ReadReport()
        list(read_samples(path, DataConfig(format=format, skip_bad_rows=True), tokenizer, report=report))
        assert report.rows == len(rows)
        list(read_pairs(path, DataConfig(format=format, skip_bad_rows=True), tokenizer, report=report))


@pytest.mark.parametrize("format", ["openai", "sharegpt", "harmony", "pairs"])
def test_a_row_with_any_part_replaced_is_a_sample_or_a_bad_row(tmp_path, tokenizer, format):
    script = scripts.script(5)
    made = {"openai": scripts.openai, "sharegpt": scripts.sharegpt, "harmony": lambda one: scripts.harmony(one, DATE)}
    row = PAIRS["openai"] if format == "pairs" else made[format](script)
    rows = [row, *mutations(row)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    read = read_pairs if format == "pairs" else read_samples
    report = ReadReport()
    samples = list(read(path, DataConfig(max_tokens=0, skip_bad_rows=True), tokenizer, report=report))
    assert report.rows == len(rows) and report.bad_rows > 5 and samples


# -- formats in detail ---------------------------------------------------------------------------------------------


def test_arguments_that_are_a_text_are_kept_to_the_letter(read, tokenizer):
    given = '{ "b":1,\n "a" : "\\u00e4" }'
    row = json.loads(json.dumps(TALK))
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = given
    assert f"<|message|>{given}<|call|>" in whole(read([row])[0], tokenizer)
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"b": 1, "a": "ä"}
    assert '<|message|>{"b":1,"a":"ä"}<|call|>' in whole(read([row])[0], tokenizer)


def test_results_without_an_id_answer_the_oldest_open_call(read, tokenizer):
    row = json.loads(json.dumps(TALK))
    del row["messages"][2]["tool_call_id"], row["messages"][1]["tool_calls"][0]["id"]
    assert_equal(read([row]), read([TALK]))
    legacy = json.loads(json.dumps(TALK))
    legacy["messages"][1]["function_call"] = legacy["messages"][1].pop("tool_calls")[0]["function"]
    legacy["messages"][2] = {"role": "function", "name": "f", "content": "R1"}
    assert_equal(read([legacy]), read([TALK]))


def test_columns_that_are_null_say_nothing(read):
    nulls = dict.fromkeys(["name", "tool_calls", "tool_call_id", "reasoning", "weight", "train", "refusal"])
    row = json.loads(json.dumps(TALK))
    row["messages"] = [{**nulls, **message} for message in row["messages"]]
    assert_equal(read([{**row, "tools": None, "effort": None, "weight": None}]), read([TALK]))


def test_thoughts_between_tags_of_other_models_are_thoughts(read):
    tagged = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes. <think>"}
    plain = {"role": "assistant", "reasoning": "Hm.", "content": "Yes. <think>"}
    ask = {"role": "user", "content": "a"}
    assert_equal(read([{"messages": [ask, tagged]}]), read([{"messages": [ask, plain]}]))
    shares = [{"from": "human", "value": "a"}, {"from": "gpt", "value": tagged["content"]}]
    assert_equal(read([{"conversations": shares}]), read([{"messages": [ask, plain]}]))


def test_the_examples_of_the_documentation_are_rows(tmp_path, tokenizer):
    page = (Path(__file__).parents[2] / "docs" / "training-data.md").read_text(encoding="utf-8")
    rows = [json.loads(block.split("```")[0]) for block in page.split("```json")[1:]]
    assert len(rows) == 2
    for row in rows:
        path = write_rows(tmp_path / "rows.jsonl", [row])
        assert list(read_samples(path, DataConfig(), tokenizer))


def test_a_row_that_is_nested_too_deeply_is_a_bad_row(tmp_path, tokenizer):
    rows = ['{"messages": %s"\\ud83d\\ude00"%s}' % ("[" * depth, "]" * depth) for depth in range(400, 1000, 10)]  # noqa: UP031
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    report = ReadReport()
    assert not list(read_samples(path, DataConfig(format="openai", skip_bad_rows=True), tokenizer, report=report))
    assert report.bad_rows == len(rows)
    assert any("nested too deeply" in problem for problem in report.problems)


def test_a_response_format_is_told_as_the_server_tells_it(read, tokenizer):
    shape = {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "schema": {"type": "object"}}}
    row = {**chat(("developer", "Say."), ("user", "a"), ("assistant", "{}")), "response_format": shape}
    prompt = server_prompt({**row, "messages": row["messages"][:2]}, tokenizer)
    assert read([row])[0].token_ids_L.tolist()[: len(prompt)] == prompt


def test_instructions_within_a_conversation_stay_in_their_place(read, tokenizer):
    row = chat(
        ("system", "A"),
        ("developer", "B"),
        ("user", "a"),
        ("assistant", "b"),
        ("system", "C"),
        ("user", "c"),
        ("assistant", "d"),
    )
    prompt = server_prompt({"messages": row["messages"][:6]}, tokenizer)
    assert read([row])[1].token_ids_L.tolist()[: len(prompt)] == prompt
    assert "A\n\nB" in tokenizer.decode(prompt)


def test_a_harmony_row_brings_its_own_system_message_or_gets_ours(read, tokenizer):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "channel": "final", "content": "b"}]
    own = {"role": "system", "content": {"model_identity": "You are Ada.", "effort": "high"}}
    assert "You are Ada.\nKnowledge cutoff: 2024-06\n\nReasoning: high" in whole(
        read([{"messages": [own, *said]}])[0], tokenizer
    )
    assert_equal(
        read([{"messages": said, "effort": "low"}]), read([chat(("user", "a"), ("assistant", "b"), effort="low")])
    )
    with pytest.raises(InputError, match=r"messages\[0\] says effort 'high' and the row 'low'"):
        read([{"messages": [own, *said], "effort": "low"}])


def test_a_text_as_system_message_of_a_harmony_row_is_what_the_developer_says(read, tokenizer):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "channel": "final", "content": "b"}]
    told = {"role": "system", "content": "Be brief."}
    assert_equal(
        read([{"messages": [told, *said], "reasoning_effort": "high"}]),
        read([chat(("system", "Be brief."), ("user", "a"), ("assistant", "b"), effort="high")]),
    )
    rendered = whole(read([{"messages": said, "effort": "low"}])[0], tokenizer)
    own = {"role": "system", "content": rendered.partition("<|message|>")[2].partition("<|end|>")[0]}
    made = read([{"messages": [own, *said]}])
    assert whole(made[0], tokenizer) == rendered and made[0].effort == "low"
    with pytest.raises(InputError, match=r"messages\[0\] says effort 'low' and the row 'high'"):
        read([{"messages": [own, *said], "effort": "high"}])


@pytest.mark.parametrize("thoughts", [{}, {"reasoning": "Hm."}])
def test_words_and_the_call_behind_them_are_one_turn_also_as_two_messages(read, tokenizer, thoughts):
    call = {"type": "function", "id": "c", "function": {"name": "f", "arguments": "{}"}}
    rest = [{"role": "tool", "tool_call_id": "c", "content": "1"}, {"role": "assistant", "content": "It is 1."}]
    openai = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "I look."}]
    openai += [{"role": "assistant", "tool_calls": [call], **thoughts}, *rest]
    sharegpt = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "I look."}]
    sharegpt += [{"from": "function_call", "value": '{"name": "f", "arguments": {}}', **thoughts}]
    sharegpt += [{"from": "observation", "value": "1"}, {"from": "gpt", "value": "It is 1."}]
    for row in ({"messages": openai}, {"conversations": sharegpt}):
        (sample,) = read([row])
        text = trained(sample, tokenizer)
        assert text.startswith("<|channel|>commentary<|message|>I look.<|end|>")
        assert text.count("<|channel|>final") == text.count("<|call|>") == text.count("<|return|>") == 1
        prompt = server_prompt({"messages": openai[:4]}, tokenizer)
        assert sample.token_ids_L.tolist()[: len(prompt)] == prompt


def test_nulls_of_other_functions_are_left_out_of_a_call(read, tokenizer):
    def tool(name: str, *keys: str) -> dict[str, Any]:
        schema = {"type": "object", "properties": {key: {"type": ["string", "null"]} for key in keys}}
        return {"type": "function", "function": {"name": name, "parameters": schema}}

    given = {"city": "Rome", "unit": None, "query": None}
    call = {"type": "function", "id": "c", "function": {"name": "weather", "arguments": given}}
    row = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}],
        "tools": [tool("weather", "city", "unit"), tool("search", "query")],
    }
    assert '<|message|>{"city":"Rome","unit":null}<|call|>' in trained(read([row])[0], tokenizer)


# -- reading in parts ----------------------------------------------------------------------------------------------


def test_readers_of_several_ranks_share_the_rows(read):
    rows = [chat(("user", f"question {i}"), ("assistant", "b")) for i in range(10)]
    lines = [[sample.line for sample in read(rows, rank=rank, world=3)] for rank in range(3)]
    assert lines == [[1, 4, 7, 10], [2, 5, 8], [3, 6, 9]]


def test_validation_rows_are_held_back_whatever_their_place(read):
    rows = [chat(("user", f"question {i}"), ("assistant", "b")) for i in range(300)]
    sides = {
        side: {tuple(s.token_ids_L.tolist()) for s in read(rows, DataConfig(validation_share=0.2, split=side))}
        for side in ("train", "validation")
    }
    assert len(sides["train"]) + len(sides["validation"]) == 300 and not sides["train"] & sides["validation"]
    assert 30 < len(sides["validation"]) < 90
    moved = read(rows[100:] + rows[:50], DataConfig(validation_share=0.2, split="validation"))
    assert {tuple(s.token_ids_L.tolist()) for s in moved} <= sides["validation"]


# -- pairs ---------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "which?"}
GOOD, POOR = {"role": "assistant", "content": "this"}, {"role": "assistant", "content": "that"}
PAIRS = {
    "texts": {"prompt": "which?", "chosen": "this", "rejected": "that"},
    "messages": {"prompt": [USER], "chosen": [GOOD], "rejected": [POOR]},
    "implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, POOR]},
    "prompt repeated": {"prompt": "which?", "chosen": [USER, GOOD], "rejected": [USER, POOR]},
    "openai": {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [POOR]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "which?"}],
        "chosen": {"from": "gpt", "value": "this"},
        "rejected": {"from": "gpt", "value": "that"},
    },
    "harmony": {
        "prompt": [USER],
        "chosen": [{**GOOD, "channel": "final"}],
        "rejected": [{**POOR, "channel": "final"}],
    },
}


@pytest.mark.parametrize("shape", PAIRS)
def test_pairs_are_read_in_every_known_shape(tmp_path, tokenizer, shape):
    path = write_rows(tmp_path / "pairs.jsonl", [PAIRS[shape]])
    (pair,) = read_pairs(path, CONFIG, tokenizer)
    assert trained(pair.chosen, tokenizer) == "<|channel|>final<|message|>this<|return|>"
    assert trained(pair.rejected, tokenizer) == "<|channel|>final<|message|>that<|return|>"
    prompt = server_prompt({"messages": [USER]}, tokenizer)
    for side in (pair.chosen, pair.rejected):
        assert side.token_ids_L.tolist()[: len(prompt)] == prompt
        assert not side.weights_L[: len(prompt)].any() and side.weights_L[len(prompt) :].all()
    assert pair.line == 1


SYSTEM = {"role": "system", "content": "Be brief."}
BEFORE = [{"role": "user", "content": "well?"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("prompt", "begin"),
    [
        ("which?", [SYSTEM, USER]),
        ([USER], [SYSTEM, {**USER, "content": "which? "}]),
        ([{**SYSTEM, "content": "Be brief.\n"}, USER], [SYSTEM, USER]),
        ([SYSTEM, USER], [USER]),
        ([SYSTEM], [SYSTEM | {"name": None}, USER]),
        ([SYSTEM], [USER]),
        ([SYSTEM, USER], [{**USER, "tool_calls": None}]),
    ],
)
def test_a_prompt_that_stands_in_the_answers_too_counts_once(tmp_path, tokenizer, prompt, begin):
    row = {"prompt": prompt, "chosen": [*begin, GOOD], "rejected": [*begin, POOR]}
    (pair,) = read_pairs(write_rows(tmp_path / "pairs.jsonl", [row]), CONFIG, tokenizer)
    told = server_prompt({"messages": [SYSTEM, USER]}, tokenizer)
    for side, answer in ((pair.chosen, "this"), (pair.rejected, "that")):
        text = tokenizer.decode(side.token_ids_L[: -side.num_trained].tolist())
        assert text.replace("which? ", "which?") == tokenizer.decode(told)
        assert trained(side, tokenizer) == f"<|channel|>final<|message|>{answer}<|return|>"


@pytest.mark.parametrize("prompt", [[*BEFORE, USER], [USER], "which?"])
def test_a_prompt_of_which_the_answers_hold_more_or_less_is_told_as_a_whole(tmp_path, tokenizer, prompt):
    begin = [USER] if len(prompt) == 3 else [*BEFORE, USER]
    row = {"prompt": prompt, "chosen": [*begin, GOOD], "rejected": [*begin, POOR]}
    (pair,) = read_pairs(write_rows(tmp_path / "pairs.jsonl", [row]), CONFIG, tokenizer)
    told = server_prompt({"messages": [*BEFORE, USER]}, tokenizer)
    assert pair.chosen.token_ids_L.tolist()[: len(told)] == pair.rejected.token_ids_L.tolist()[: len(told)] == told
    assert pair.chosen.num_trained == len(pair.chosen) - len(told)


def test_a_pair_after_a_tools_result_trains_the_answers_alone(tmp_path, tokenizer):
    row = {
        "prompt": TALK["messages"][:3],
        "chosen": [{"role": "assistant", "reasoning": "T2", "content": "A1"}],
        "rejected": "A2",
    }
    (pair,) = read_pairs(write_rows(tmp_path / "pairs.jsonl", [row]), CONFIG, tokenizer)
    assert trained(pair.chosen, tokenizer).count("<|message|>") == 2
    assert trained(pair.rejected, tokenizer) == "<|channel|>final<|message|>A2<|return|>"
    assert "T1" in whole(pair.rejected, tokenizer)


@pytest.mark.parametrize(("chosen", "rejected"), [("long " * 90, "short"), ("short", "long " * 90)])
def test_of_a_pair_that_is_cut_both_answers_lose_the_same_turns(tmp_path, tokenizer, chosen, rejected):
    turns = [(f"question {i}", f"answer {i}") for i in range(4)]
    prompt = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    row = {"prompt": [*prompt, USER], "chosen": chosen, "rejected": rejected}
    path = write_rows(tmp_path / "pairs.jsonl", [row])
    (pair,) = read_pairs(path, DataConfig(current_date=DATE, max_tokens=190, overlong="cut"), tokenizer)
    prompts = [
        tokenizer.decode(side.token_ids_L[: int(np.flatnonzero(side.weights_L)[0])].tolist())
        for side in (pair.chosen, pair.rejected)
    ]
    assert prompts[0] == prompts[1] and "question 3" in prompts[0] and "question 0" not in prompts[0]
    assert 150 < max(len(pair.chosen), len(pair.rejected)) <= 190
    report = ReadReport()
    none = DataConfig(current_date=DATE, max_tokens=100, overlong="cut")
    assert not list(read_pairs(path, none, tokenizer, report=report)) and report.too_long == 1


def test_answers_of_which_only_the_end_is_trained_still_have_one_prompt(tmp_path, tokenizer):
    row = {"prompt": [USER], "chosen": [{**GOOD, "reasoning": "T"}], "rejected": [POOR]}
    config = DataConfig(current_date=DATE, train="final")
    (pair,) = read_pairs(write_rows(tmp_path / "pairs.jsonl", [row]), config, tokenizer)
    assert trained(pair.chosen, tokenizer).endswith("<|message|>this<|return|>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same"),
        ({"chosen": "b", "rejected": "c"}, "texts without a prompt|'messages'"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "x"}, POOR]}, "different messages"),
        ({"prompt": [USER], "chosen": [GOOD, USER, POOR], "rejected": [POOR]}, "chosen has 2 turns"),
        ({"prompt": [USER], "chosen": [{**GOOD, "weight": 0}, USER, POOR], "rejected": [POOR]}, "different prompts"),
        ({"prompt": [USER], "chosen": [], "rejected": [POOR]}, "chosen adds nothing"),
        ({"prompt": "who?", "chosen": [USER, GOOD], "rejected": [USER, POOR]}, "other messages than the prompt"),
        ({"prompt": "which?", "chosen": [SYSTEM, USER, GOOD], "rejected": [POOR]}, "different messages"),
        ({"messages": [USER, GOOD]}, "expected 'prompt', 'chosen' and 'rejected'"),
    ],
)
def test_a_bad_pair_is_an_error_with_its_line(tmp_path, tokenizer, row, message):
    with pytest.raises(InputError, match=r"pairs\.jsonl:1: .*(" + message + ")"):
        list(read_pairs(write_rows(tmp_path / "pairs.jsonl", [row]), CONFIG, tokenizer))


# -- against openai-harmony ----------------------------------------------------------------------------------------


def test_samples_equal_what_openai_harmony_renders_for_training(oracle, read):
    import openai_harmony as oh

    num = 0
    keep_all = oh.RenderConversationConfig(auto_drop_analysis=False)
    for seed in SEEDS:
        script = scripts.script(seed)
        row = scripts.harmony(script, DATE)
        messages = Conversation.from_dict(row).messages
        answers = [i for i, message in enumerate(messages) if message.channel == Channel.FINAL]
        for k, sample in enumerate(read([row])):
            begin = answers[k - 1] if k else 0
            kept = [m for i, m in enumerate(messages[: answers[k] + 1]) if i >= begin or m.channel != Channel.ANALYSIS]
            theirs = oracle.render_conversation_for_training(their_conversation(Conversation(tuple(kept))), keep_all)
            assert sample.token_ids_L.tolist() == theirs
            if k == 1:
                # Their own rule drops what comes before the first answer: of two turns the same.
                both = their_conversation(Conversation(messages[: answers[k] + 1]))
                assert sample.token_ids_L.tolist() == oracle.render_conversation_for_training(both)
            # The mask begins where their prompt for a completion ends.
            asked = their_conversation(Conversation(tuple(kept[: last_asked(kept) + 1])))
            prompt = oracle.render_conversation_for_completion(asked, oh.Role.ASSISTANT, keep_all)
            assert int(np.flatnonzero(sample.weights_L)[0]) == len(prompt)
            num += 1
    assert num > 80


def last_asked(messages: list[Message]) -> int:
    return max(i for i, message in enumerate(messages) if message.role is Role.USER)
