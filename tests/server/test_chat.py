"""Chat Completions, Completions, Models, Anthropic's Messages and Ollama's questions."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from tests.responses.scripts import CALL, FINAL, PREAMBLE, REASONED, TOKENIZER, model, tokens
from tests.server.conftest import Served

from ossia.engine.masks import GrammarCompiler
from ossia.responses.constrain import Grammars
from ossia.server.chat import ChatRequest, _Frame, to_response_request
from ossia.server.messages import _tool
from ossia.server.store import Store

PARAMETERS = {"type": "object", "properties": {"a": {"type": "number"}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
USER = {"role": "user", "content": "2+2?"}


def chat(served, **fields: Any) -> Any:
    return served.openai.chat.completions.create(**{"model": "gpt-oss-20b", "messages": [USER], **fields})


def test_a_completion_has_its_reasoning_under_both_names(served):
    made = chat(served)
    message = made.choices[0].message
    assert message.content == "The answer is 4."
    assert message.reasoning == message.reasoning_content == "2 and 2 make 4."
    assert made.choices[0].finish_reason == "stop"
    assert made.usage.completion_tokens_details.reasoning_tokens > 0
    assert made.usage.prompt_tokens_details.cached_tokens == 7


def test_chunks_add_up_to_the_whole_and_usage_comes_last(served):
    chunks = list(chat(served, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "The answer is 4."
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == "2 and 2 make 4."
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(tokens(REASONED + FINAL))
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("streams", [False, True])
def test_a_call_is_told_and_its_answer_continues_exactly(served, streams):
    engine = served.play(REASONED + PREAMBLE + CALL, FINAL)
    if streams:
        with served.openai.chat.completions.stream(model="gpt-oss-20b", messages=[USER], tools=[ADD]) as stream:
            choice = stream.get_final_completion().choices[0]
    else:
        choice = chat(served, tools=[ADD]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I shall add them."
    call = choice.message.tool_calls[0]
    assert (call.function.name, call.function.arguments) == ("add", '{"a": 2, "b": 2}')
    # The client drops the chain of thought, and the preamble.
    assistant = {"role": "assistant", "content": None, "tool_calls": [call.to_dict()]}
    chat(served, tools=[ADD], messages=[USER, assistant, {"role": "tool", "tool_call_id": call.id, "content": "4"}])
    prompt, after = engine.prompts
    sampled = tokens(REASONED + PREAMBLE + CALL)
    assert after[: len(prompt) + len(sampled)] == prompt + sampled


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_taken_back_under_every_name(served, name):
    engine = served.play(FINAL)
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    assistant = {"role": "assistant", "content": "", name: "I must add.", "tool_calls": [call]}
    chat(served, tools=[ADD], messages=[USER, assistant, {"role": "tool", "tool_call_id": "c1", "content": "4"}])
    assert "analysis<|message|>I must add.<|end|>" in TOKENIZER.decode(engine.prompts[0])


def test_a_custom_tool_is_called_with_text(served):
    served.play("<|channel|>commentary to=functions.patch<|message|>*** Begin<|call|>")
    grammar = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /.+/"}}
    tool = {"type": "custom", "custom": {"name": "patch", "format": grammar}}
    message = chat(served, tools=[tool]).choices[0].message
    assert message.tool_calls[0].custom.input == "*** Begin"
    chunks = list(chat(served, tools=[tool], stream=True))
    parts = [c.choices[0].delta.tool_calls[0].to_dict() for c in chunks if c.choices[0].delta.tool_calls]
    assert "".join(part["custom"]["input"] for part in parts) == "*** Begin"


class Sum(BaseModel):
    value: int


def test_functions_of_these_forms_are_strict_only_where_they_say_so():
    schema = {"type": "object"}
    for given, is_strict in (({}, False), ({"strict": None}, False), ({"strict": True}, True)):
        flat = {"name": "f", "parameters": schema, **given}
        tools = [{"type": "function", "function": flat}]
        (tool,) = to_response_request(ChatRequest(messages=[USER], tools=tools)).tools
        assert tool["strict"] is is_strict
        assert _tool({"name": "f", "input_schema": schema, **given})["strict"] is is_strict


def test_structured_output_is_asked_for_and_parsed(served):
    engine = served.play(REASONED + '<|channel|>final<|message|>{"value": 4}<|return|>')
    made = served.openai.chat.completions.parse(model="gpt-oss-20b", messages=[USER], response_format=Sum)
    assert made.choices[0].message.parsed == Sum(value=4)
    assert "# Response Formats\n\n## Sum" in TOKENIZER.decode(engine.prompts[0])
    chat(served, response_format={"type": "json_object"})


@pytest.mark.parametrize("script", [PREAMBLE + FINAL, REASONED + REASONED + FINAL])
def test_an_answer_that_is_cut_anywhere_is_the_same_whole_and_streamed(served, script):
    for limit in range(1, len(tokens(script)) + 1):
        served.play(script)
        whole = chat(served, tools=[ADD], max_tokens=limit).choices[0].message
        served.play(script)
        deltas = [chunk.choices[0].delta for chunk in chat(served, tools=[ADD], max_tokens=limit, stream=True)]
        assert "".join(delta.content or "" for delta in deltas) == whole.content, limit
        thought = "".join(getattr(delta, "reasoning", None) or "" for delta in deltas)
        assert thought == (getattr(whole, "reasoning", None) or ""), limit


def test_several_choices_each_draw_their_own_seed(served):
    engine = served.play(REASONED + FINAL)
    made = chat(served, n=3, seed=7)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert sorted(params.seed for params in engine.params) == [7, 8, 9]
    chunks = [chunk.choices[0] for chunk in chat(served, n=2, stream=True)]
    for index in (0, 1):
        assert "".join(c.delta.content or "" for c in chunks if c.index == index) == "The answer is 4."


def test_stop_texts_and_the_cap_end_the_answer(served):
    assert chat(served, stop=" is").choices[0].message.content == "The answer"
    assert chat(served, stop=[" is"]).choices[0].finish_reason == "stop"
    cut = chat(served, max_completion_tokens=6).choices[0]
    assert cut.finish_reason == "length" and cut.message.content == "" and cut.message.reasoning


def test_log_probabilities_are_of_the_content(served):
    for made in (chat(served, logprobs=True, top_logprobs=2), chat(served, logprobs=True)):
        entries = made.choices[0].logprobs.content
        assert "".join(entry.token for entry in entries) == "The answer is 4."
    chunks = list(chat(served, logprobs=True, top_logprobs=1, stream=True))
    told = [entry.token for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert "".join(told) == "The answer is 4."


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "high"},
        {"extra_body": {"chat_template_kwargs": {"reasoning_effort": "high"}}},
        {"extra_body": {"reasoning": {"effort": "high"}}},
    ],
)
def test_the_effort_is_heard_from_every_side(served, fields):
    engine = served.play(FINAL)
    chat(served, **fields)
    assert "Reasoning: high" in TOKENIZER.decode(engine.prompts[0])


def test_sampling_reaches_the_engine(served):
    engine = served.play(FINAL)
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    chat(
        served,
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=1,
        presence_penalty=-1,
        logit_bias={"5": 2},
        extra_body=extra,
    )
    params = engine.params[0]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.frequency_penalty, params.presence_penalty, params.logit_bias) == (1, -1, {5: 2})


def test_reasoning_can_be_left_out(served):
    message = chat(served, extra_body={"include_reasoning": False}).choices[0].message
    assert not hasattr(message, "reasoning") and message.content


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "tool", "tool_call_id": "gone", "content": "4"}]},
        {"messages": [{"role": "assistant", "tool_calls": ["x"]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": []},
        {"reasoning_effort": "enormous"},
        {"response_format": {"type": "yaml"}},
        {"logit_bias": {"x": 1}},
        {"extra_body": {"modalities": ["audio"]}},
        {"tool_choice": "required"},
    ],
)
def test_what_cannot_be_is_the_clients_fault(served, fields):
    with pytest.raises(openai.BadRequestError):
        chat(served, **fields)


PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
THOUGHT = {"role": "assistant", "reasoning": "t", "content": "x", "tool_calls": [
    {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}]}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [THOUGHT, {"role": "tool", "tool_call_id": "c", "content": "y"}, PICTURE]},
         "messages[2].content[0]"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
        ({"messages": [THOUGHT, {"role": "tool", "tool_call_id": "c", "content": [{}]}]}, "messages[1].content[0]"),
        ({"messages": [USER, {"role": "tool", "tool_call_id": "gone", "content": "y"}]}, "messages[1]"),
        ({"messages": [{"role": "assistant", "tool_calls": [THOUGHT["tool_calls"][0], {"type": "function", "function":
          {}}]}]}, "messages[0].tool_calls[1].function.name"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "add",
          "arguments": {"a": 1}}}]}]}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add",
          "arguments": "{}"}}]}]}, "messages[0].tool_calls[0].id"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"model": "gpt-5"}, "model"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)  # fmt: skip
def test_errors_name_the_fields_of_chat_completions(served, body, param):
    error = served.http.post("/v1/chat/completions", json={"messages": [USER], **body}).json()["error"]
    assert error["param"] == param
    assert not any(word in error["message"] for word in ("input[", "text.format", "reasoning.effort"))


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "messages[0].content[0].text"),
        ({"messages": [USER, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
         "messages[1].content[0]"),
        ({"output_config": {"effort": "enormous"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
    ],
)  # fmt: skip
def test_errors_name_the_fields_of_messages(served, body, place):
    for path in ("messages", "messages/count_tokens"):
        body = {"messages": [USER], "max_tokens": 9, **body}
        assert served.http.post(f"/v1/{path}", json=body).json()["error"]["message"].startswith(place)


WRONG = {"name": "x", "strict": True, "schema": {"not": {}}}


@pytest.mark.parametrize(
    "body", [{"response_format": {"type": "json_schema", "json_schema": WRONG}}, {"guided_json": WRONG["schema"]}]
)
def test_a_schema_that_cannot_be_enforced_is_named_as_it_was_given(body):
    constrain = Grammars(GrammarCompiler(TOKENIZER))
    served = Served(model(FINAL, constrain=constrain), Store("sqlite://"))
    error = served.http.post("/v1/chat/completions", json={"messages": [USER], **body}).json()["error"]
    place = "response_format.json_schema.schema" if "response_format" in body else "guided_json"
    assert error["param"] == place and error["message"].startswith(place)
    served.stop()


def test_a_failure_in_a_stream_is_told(serve):
    from tests.responses.scripts import Scripted

    from ossia.errors import UnavailableError

    class Failing(Scripted):
        async def _read(self, prompt, params):
            async for output in super()._read(prompt, params):
                yield output
                raise UnavailableError("the engine is gone")

    served = serve(engine=Failing(FINAL))
    with pytest.raises(openai.APIError, match="the engine is gone"):
        list(chat(served, stream=True))
    with pytest.raises(openai.InternalServerError):
        chat(served)
    body = {"max_tokens": 9, "messages": [USER], "stream": True}
    assert "event: error" in served.http.post("/v1/messages", json=body).text


def test_raw_prompts_are_completed_from_text_and_from_tokens(served):
    engine = served.play(" there and<|return|>")
    made = served.openai.completions.create(model="gpt-oss-20b", prompt="Hi", logprobs=1, echo=True, n=2)
    assert [choice.text for choice in made.choices] == ["Hi there and"] * 2
    # With echo the prompt's tokens are told of as well; nothing precedes the first one.
    assert made.choices[0].logprobs.tokens == ["Hi", " there", " and", "<|return|>"]
    assert made.choices[0].logprobs.token_logprobs[0] is None
    served.openai.completions.create(model="gpt-oss-20b", prompt=[1, 2, 3])
    assert engine.prompts[0] == TOKENIZER.encode("Hi") and engine.prompts[-1] == [1, 2, 3]
    options = {"include_usage": True}
    chunks = list(
        served.openai.completions.create(model="gpt-oss-20b", prompt=["a", "b"], stream=True, stream_options=options)
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices and c.choices[0].index == 1) == " there and"
    assert chunks[-1].usage.completion_tokens == 6
    assert (
        served.openai.completions.create(model="gpt-oss-20b", prompt="a", max_tokens=0, echo=True).choices[0].text
        == "a"
    )
    for wrong in ({"suffix": "x"}, {"model": "x"}, {"prompt": ["a"] * 65}):
        assert 400 <= served.http.post("/v1/completions", json={"prompt": "a", **wrong}).status_code < 500


def test_a_prompt_counts_once_for_all_of_its_choices(served):
    served.play(" there and<|return|>")
    num_tokens = len(TOKENIZER.encode("Hi"))
    for prompt, num in (("Hi", 1), (["Hi", "Hi"], 2)):
        made = served.openai.completions.create(model="gpt-oss-20b", prompt=prompt, n=3)
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (num * num_tokens, num * 9)
        assert made.usage.prompt_tokens_details.cached_tokens == num * 7


def test_each_chunk_of_a_raw_stream_has_its_own_log_probabilities(served):
    served.play(" there 🎼 and<|return|>")
    asked = {"model": "gpt-oss-20b", "prompt": "Hi", "logprobs": 0}
    whole = served.openai.completions.create(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in served.openai.completions.create(**asked, stream=True)]
    assert [chunk.text for chunk in chunks] == [" there", " ", "🎼", " and", ""]
    told = [chunk.logprobs for chunk in chunks]
    assert [one.text_offset[0] for one in told] == [0, 6, 7, 8, 12]
    assert "".join(told[0].tokens) == " there" and told[-1].tokens == ["<|return|>"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for one in told for value in getattr(one, name)] == getattr(whole.logprobs, name)
    # Parts of a character each by its own name.
    assert told[1].tokens + told[2].tokens == [r"bytes:\x20\xf0\x9f\x8e", r"bytes:\xbc"]
    # The chosen token stands among the likeliest, also where none were asked for.
    assert whole.logprobs.top_logprobs[0] == {" there": -0.5}


def test_fields_of_completions_that_change_nothing_are_named(served):
    answer = served.http.post("/v1/completions", json={"prompt": "Hi", "best_of": 2, "user": "me"})
    assert answer.headers["x-ossia-ignored-fields"] == "best_of"
    streamed = served.http.post("/v1/completions", json={"prompt": "Hi", "best_of": 2, "stream": True})
    assert streamed.headers["x-ossia-ignored-fields"] == "best_of"


def test_models_are_listed_under_all_their_names(served):
    names = [one.id for one in served.openai.models.list()]
    assert names == ["gpt-oss-20b", "gpt-oss:20b", "openai/gpt-oss-20b"]
    assert served.openai.models.retrieve("openai/gpt-oss-20b").owned_by == "openai"
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("gpt-5")


def test_an_ollama_would_answer_the_same_three_questions(served):
    assert served.http.get("/api/version").json()["version"]
    assert "gpt-oss:20b" in [one["name"] for one in served.http.get("/api/tags").json()["models"]]
    assert "tools" in served.http.post("/api/show", json={"model": "gpt-oss:20b"}).json()["capabilities"]
    assert served.http.post("/api/show", json={}).status_code == 404


# Anthropic's Messages ----------------------------------------------------------------------------------------------


def messages(served, **fields: Any) -> Any:
    return served.http.post("/v1/messages", json={"model": "claude", "max_tokens": 100, "messages": [USER], **fields})


def events_of(text: str) -> list[dict[str, Any]]:
    events = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_a_message_has_thinking_and_text(served):
    made = messages(served, system="Be brief.").json()
    assert [block["type"] for block in made["content"]] == ["thinking", "text"]
    assert (made["stop_reason"], made["role"], made["model"]) == ("end_turn", "assistant", "claude")
    assert made["usage"]["cache_read_input_tokens"] == 7


def test_a_streamed_message_has_every_block_opened_and_closed(served):
    served.play(REASONED + PREAMBLE + CALL)
    tool = {"name": "add", "input_schema": PARAMETERS}
    events = events_of(messages(served, stream=True, tools=[tool]).text)
    kinds = [
        event["type"] for event in events if not event["type"].endswith("_delta") or event["type"] == "message_delta"
    ]
    block = ["content_block_start", "content_block_stop"]
    assert kinds == ["message_start", "ping", *block * 3, "message_delta", "message_stop"]
    assert events[0]["message"]["usage"]["input_tokens"] > 0
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(d.get("partial_json", "") for d in deltas)) == {"a": 2, "b": 2}
    assert any(delta["type"] == "signature_delta" for delta in deltas)
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_a_tool_result_continues_exactly(served):
    engine = served.play(REASONED + PREAMBLE + CALL, FINAL)
    tool = {"name": "add", "input_schema": PARAMETERS}
    content = messages(served, tools=[tool]).json()["content"]
    result = {"type": "tool_result", "tool_use_id": content[-1]["id"], "content": [{"type": "text", "text": "4"}]}
    history = [USER, {"role": "assistant", "content": content}, {"role": "user", "content": [result]}]
    assert messages(served, tools=[tool], messages=history).json()["stop_reason"] == "end_turn"
    prompt, after = engine.prompts
    sampled = tokens(REASONED + PREAMBLE + CALL)
    assert after[: len(prompt) + len(sampled)] == prompt + sampled


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"type": "image", "source": {}}], "[image left out: this model reads text only]"),
        ([{"type": "text", "text": "a.pdf:"}, {"type": "document", "source": {}}],
         "a.pdf:\n[document left out: this model reads text only]"),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        (None, ""),
    ],
)  # fmt: skip
def test_what_a_tool_result_holds_beside_text_is_named_to_the_model(served, content, told):
    result = {"type": "tool_result", "tool_use_id": "t", "content": content, "is_error": True}
    call = {"type": "tool_use", "id": "t", "name": "add", "input": {}}
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": [call]}]
    messages(served, messages=[*said, {"role": "user", "content": [result]}])
    assert f"<|message|>Error: {told}<|end|>" in TOKENIZER.decode(served.engine.prompts[-1])


@pytest.mark.parametrize("content", [7, {}, ["x"], [{"type": "text"}], [{"type": {}}]])
def test_a_tool_result_that_is_none_is_the_clients_fault(served, content):
    result = {"type": "tool_result", "tool_use_id": "t", "content": content}
    call = {"type": "tool_use", "id": "t", "name": "add", "input": {}}
    body = {"messages": [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]}
    answer = served.http.post("/v1/messages", json={**body, "max_tokens": 9})
    assert answer.status_code == 400 and "messages[1].content[0].content" in answer.text


def test_messages_know_budgets_stops_and_counts(served):
    engine = served.play(REASONED + FINAL)
    stopped = messages(served, stop_sequences=[" is"], thinking={"type": "enabled", "budget_tokens": 30_000}).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " is")
    assert "Reasoning: high" in TOKENIZER.decode(engine.prompts[0])
    assert messages(served, max_tokens=3).json()["stop_reason"] == "max_tokens"
    for budget, effort in ((1_024, "low"), (8_000, "medium")):
        messages(served, thinking={"type": "enabled", "budget_tokens": budget})
        assert f"Reasoning: {effort}" in TOKENIZER.decode(engine.prompts[-1])
    messages(served, thinking={"type": "disabled"}, tool_choice={"type": "none"}, top_k=4)
    assert engine.params[-1].top_k == 4
    counted = served.http.post("/v1/messages/count_tokens", json={"messages": [USER]}).json()
    assert counted["input_tokens"] == messages(served).json()["usage"]["input_tokens"] + 7


@pytest.mark.parametrize(
    "content", [[{"type": "image"}], 5, ["x"], [{"type": "tool_result", "tool_use_id": "x", "content": [{}]}]]
)
def test_errors_of_messages_have_their_own_shape(served, content):
    answer = messages(served, messages=[{"role": "user", "content": content}])
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


# Stored completions ------------------------------------------------------------------------------------------------


def test_a_completion_is_stored_listed_changed_and_deleted(served):
    stored = served.openai.chat.completions
    made = [chat(served, store=True, metadata={"n": str(n), "kind": "sum"}) for n in range(3)]
    assert stored.retrieve(made[0].id).choices == made[0].choices
    assert stored.retrieve(made[0].id).metadata == {"n": "0", "kind": "sum"}
    ids = [one.id for one in stored.list(limit=2, metadata={"kind": "sum"})]
    assert [one for one in ids if one in {m.id for m in made}] == [one.id for one in made]
    assert stored.list(order="desc", limit=1).data[0].id == made[2].id
    assert next(iter(stored.list(metadata={"n": "1"}, order="desc"))).id == made[1].id
    assert not stored.list(model="gpt-5").data
    assert stored.update(made[1].id, metadata={"n": "7"}).metadata == {"n": "7"}
    assert stored.retrieve(made[1].id).metadata == {"n": "7"}
    messages = list(stored.messages.list(made[0].id, limit=1))
    assert [(m.id, m.role, m.content) for m in messages] == [(f"{made[0].id}-0", "user", "2+2?")]
    for one in made:
        assert stored.delete(one.id).deleted
        with pytest.raises(openai.NotFoundError):
            stored.retrieve(one.id)


def test_a_streamed_completion_is_stored_before_its_last_word(served):
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    for chunk in chat(served, stream=True, store=True, n=2, messages=[{"role": "user", "content": parts}]):
        last = chunk
    kept = served.openai.chat.completions.retrieve(last.id)
    assert [choice.message.content for choice in kept.choices] == ["The answer is 4."] * 2
    message = served.openai.chat.completions.messages.list(last.id).data[0]
    assert message.content == "2+2?" and len(message.content_parts) == 2
    with pytest.raises(openai.NotFoundError):
        served.openai.chat.completions.retrieve(chat(served).id)


# What other servers' clients send ----------------------------------------------------------------------------------


def formats(served, **fields: Any) -> Any:
    asked = chat(served, extra_body={"messages": [USER], **fields})
    return to_response_request(ChatRequest(messages=[USER], **fields)).format, asked


@pytest.mark.parametrize(
    ("fields", "kind", "bound"),
    [
        ({"guided_json": {"type": "object"}}, "json_schema", {"type": "object"}),
        ({"guided_json": '{"type": "object"}'}, "json_schema", {"type": "object"}),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema", {"type": "object"}),
        ({"response_format": {"type": "json_object", "schema": {"type": "object"}}}, "json_schema", {"type": "object"}),
        ({"structured_outputs": {"json_object": True, "disable_any_whitespace": True}}, "json_object", None),
        ({"guided_regex": "[0-9]+"}, "grammar", "[0-9]+"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar", 'start: "a"'),
        ({"guided_choice": ["yes", 'n"o']}, "grammar", 'start: "yes" | "n\\"o"'),
        ({"response_format": {"type": "json_schema", "schema": {"type": "object"}}}, "json_schema", {"type": "object"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
            "json_schema",
            {"type": "object"},
        ),
    ],
)
def test_the_form_of_an_answer_is_heard_from_every_side(served, fields, kind, bound):
    form, _ = formats(served, **fields)
    assert form.type == kind and (form.json_schema or form.definition) == bound
    assert kind == "json_object" or form.is_strict or form.syntax


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_choice": ["a"], "guided_regex": "b"}, "guided_choice", "guided_regex and guided_choice each say"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "b"}},
            "structured_outputs.regex",
            "response_format and structured_outputs.regex each say",
        ),
        ({"guided_choice": []}, "guided_choice", "guided_choice is '[]'"),
        ({"guided_json": "{"}, "guided_json", "guided_json is no JSON"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not offered"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "not offered"),
    ],
)
def test_a_form_that_cannot_be_is_named_as_the_client_names_it(served, fields, param, words):
    answer = served.http.post("/v1/chat/completions", json={"messages": [USER], **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param and words in answer.json()["error"]["message"]


def test_a_schema_that_does_not_say_is_enforced_where_it_can_be(served):
    for schema, strict, echoed in (
        ({"type": "object"}, None, True),
        ({"type": "object"}, False, False),
        ({"not": {"type": "object"}}, None, False),
    ):
        served.play(FINAL)
        form = {"type": "json_schema", "name": "x", "schema": schema, **({} if strict is None else {"strict": strict})}
        made = (
            served.http.post("/v1/responses", json={"input": "x", "text": {"format": form}}).raise_for_status().json()
        )
        assert made["text"]["format"]["strict"] is echoed


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({"think": True}, "medium"),
        ({"think": False}, "low"),
        ({"think": "high"}, "high"),
        ({"thinking": {"type": "enabled", "budget_tokens": 30_000}}, "high"),
        ({"thinking": {"type": "disabled"}}, "low"),
        ({"reasoning": {"enabled": False}}, "low"),
        ({"think": True, "reasoning_effort": "high"}, "high"),
    ],
)
def test_the_effort_is_heard_from_other_servers_clients(served, fields, effort):
    engine = served.play(FINAL)
    chat(served, extra_body=fields)
    assert f"Reasoning: {effort}" in TOKENIZER.decode(engine.prompts[0])


def test_what_is_to_be_parsed_stands_alone(served):
    script = PREAMBLE + REASONED + REASONED + '<|channel|>final<|message|>{"value": 4}<|return|>'
    served.play(script)
    made = served.openai.chat.completions.parse(
        model="gpt-oss-20b",
        messages=[USER],
        response_format=Sum,
        tools=[{**ADD, "function": {**ADD["function"], "strict": True}}],
    )
    assert made.choices[0].message.parsed == Sum(value=4)
    thoughts = "I shall add them.\n\n2 and 2 make 4.\n\n2 and 2 make 4."
    assert made.choices[0].message.reasoning == thoughts
    chunks = list(chat(served, stream=True, tools=[ADD], response_format={"type": "json_object"}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == '{"value": 4}'
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == thoughts
    for streams in (False, True):
        made = chat(served, stream=streams)
        said = (
            made.choices[0].message.content if not streams else "".join(c.choices[0].delta.content or "" for c in made)
        )
        assert said == 'I shall add them.\n\n{"value": 4}'


def test_fields_that_change_nothing_are_named_and_old_ones_are_refused(served):
    answer = served.http.post(
        "/v1/chat/completions", json={"messages": [USER], "novel": 1, "user": "me", "verbosity": "low"}
    )
    assert answer.headers["x-ossia-ignored-fields"] == "novel"
    for name in ("functions", "function_call"):
        with pytest.raises(openai.BadRequestError, match="older API"):
            chat(served, extra_body={name: [{"name": "add"}]})
    searching = chat(served, extra_body={"web_search_options": {}})
    assert searching.choices[0].message.content
    raw = served.openai.chat.completions.with_raw_response.create(
        model="gpt-oss-20b", messages=[USER], extra_body={"web_search_options": {}}
    )
    assert raw.headers["x-ossia-ignored-tools"] == "web_search"


def test_a_chunk_is_the_same_json_however_its_bytes_are_made():
    for stream_options in (None, {"include_usage": True}):
        frame = _Frame("m", ChatRequest(messages=[USER], stream_options=stream_options))
        for delta in (
            {"content": '"\\ \n🎼'},
            {"reasoning": "x", "reasoning_content": "x"},
            {"role": "assistant", "content": ""},
            {"tool_calls": []},
            {},
        ):
            for logprobs in (None, {"content": [], "refusal": None}):
                choice = {"index": 3, "delta": delta, "logprobs": logprobs, "finish_reason": None}
                assert json.loads(frame.delta(choice)[6:]) == json.loads(frame.chunk([choice])[6:])


def test_chunks_are_padded_when_that_is_asked_for(served):
    options = {"include_obfuscation": True}
    text = served.http.post(
        "/v1/chat/completions", json={"messages": [USER], "stream": True, "stream_options": options}
    ).text
    blocks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert all(block["obfuscation"] for block in blocks)
    assert (
        len({(len(json.dumps(b["choices"], separators=(",", ":"))) + len(b["obfuscation"])) % 32 for b in blocks}) == 1
    )


def test_anthropics_structured_output_and_effort_are_heard(served):
    engine = served.play(REASONED + FINAL)
    shape = {"type": "json_schema", "schema": {"type": "object"}}
    messages(served, output_config={"effort": "high", "format": shape})
    prompt = TOKENIZER.decode(engine.prompts[0])
    assert "Reasoning: high" in prompt and "# Response Formats" in prompt
