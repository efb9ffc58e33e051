"""The Responses API over HTTP, raw and by the openai package."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from tests.responses.lint import lint, read_sse
from tests.responses.scripts import CALL, FINAL, PREAMBLE, REASONED, TOKENIZER, Scripted, model, tokens
from tests.server.conftest import Served

from ossia.server.store import Store

ADD = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}


def create(served, **fields: Any) -> Any:
    return served.http.post("/v1/responses", json={"input": "2+2?", **fields})


def test_text_comes_whole_or_streamed_and_both_are_equal(served):
    whole = create(served).raise_for_status().json()
    streamed = create(served, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    last = lint(read_sse(streamed.text))
    unlike = {"id", "created_at", "completed_at", "output"}
    assert {k: v for k, v in whole.items() if k not in unlike} == {k: v for k, v in last.items() if k not in unlike}
    strip = [{key: value for key, value in item.items() if key != "id"} for item in whole["output"]]
    assert strip == [{key: value for key, value in item.items() if key != "id"} for item in last["output"]]


def test_a_stored_response_is_retrieved_listed_and_deleted(served):
    made = served.openai.responses.create(model="gpt-oss-20b", input="2+2?", metadata={"a": "b"})
    assert made.output_text == "The answer is 4."
    assert served.openai.responses.retrieve(made.id).to_dict() == made.to_dict()
    items = served.openai.responses.input_items.list(made.id)
    assert [item.content[0].text for item in items] == ["2+2?"]
    served.openai.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        served.openai.responses.retrieve(made.id)


def test_what_is_not_to_be_stored_is_not(served):
    made = served.openai.responses.create(model="gpt-oss-20b", input="2+2?", store=False)
    with pytest.raises(openai.NotFoundError):
        served.openai.responses.retrieve(made.id)


def test_a_finished_stream_is_told_again_byte_for_byte(served):
    first = create(served, stream=True).content
    response_id = lint(read_sse(first.decode()))["id"]
    assert served.http.get(f"/v1/responses/{response_id}?stream=true").content == first
    after = served.http.get(f"/v1/responses/{response_id}?stream=true&starting_after=3").content
    assert first.endswith(after) and json.loads(after.split(b"data: ")[1].split(b"\n")[0])["sequence_number"] == 4


def test_a_response_that_was_not_streamed_can_be_streamed_later(served):
    response = create(served).json()
    assert lint(read_sse(served.http.get(f"/v1/responses/{response['id']}?stream=true").text)) == response


def test_the_prompt_after_a_call_repeats_every_sampled_token(served):
    engine = served.play(REASONED + PREAMBLE + CALL, FINAL)
    first = create(served, tools=[ADD]).json()
    output = {"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "4"}
    second = create(served, tools=[ADD], previous_response_id=first["id"], input=[output]).json()
    assert second["status"] == "completed" and second["previous_response_id"] == first["id"]
    prompt, after = engine.prompts
    sampled = tokens(REASONED + PREAMBLE + CALL)
    assert after[: len(prompt) + len(sampled)] == prompt + sampled


def test_a_chain_of_responses_tells_the_whole_story_and_instructions_are_not_inherited(served):
    engine = served.play(REASONED + FINAL)
    first = create(served, instructions="Be brief.").json()
    create(served, input="And 3+3?", previous_response_id=first["id"])
    prompt = TOKENIZER.decode(engine.prompts[-1])
    assert "2+2?" in prompt and "The answer is 4.<|end|>" in prompt and "And 3+3?" in prompt
    assert "Be brief." not in prompt and "2 and 2 make 4" not in prompt


def test_a_missing_link_of_the_chain_is_named(served):
    answer = create(served, previous_response_id="resp_gone")
    assert answer.status_code == 400
    assert "resp_gone" in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "previous_response_id"


def test_an_item_can_be_referred_to(served):
    engine = served.play(REASONED + FINAL)
    first = create(served).json()
    reference = {"type": "item_reference", "id": first["output"][1]["id"]}
    assert create(served, input=[{"role": "user", "content": "Hi"}, reference]).status_code == 200
    assert "The answer is 4." in TOKENIZER.decode(engine.prompts[-1])


def test_tokens_are_counted_as_they_are_read(served):
    counted = served.openai.responses.input_tokens.count(model="gpt-oss-20b", input="2+2?")
    assert counted.input_tokens == create(served).json()["usage"]["input_tokens"]


def test_a_compaction_stands_for_what_was_said(served):
    engine = served.play("<|channel|>final<|message|>They added 2 and 2.<|return|>", FINAL)
    compacted = served.openai.responses.compact(model="gpt-oss-20b", input="2+2?")
    assert [item.type for item in compacted.output] == ["message", "compaction"]
    items = [item.to_dict() for item in compacted.output]
    assert create(served, input=[*items, {"role": "user", "content": "So?"}]).status_code == 200
    assert "They added 2 and 2." in TOKENIZER.decode(engine.prompts[-1])
    forged = {"type": "compaction", "encrypted_content": "gAAAA"}
    assert create(served, input=[forged]).status_code == 400


def test_a_background_response_is_queued_made_and_followed(served):
    served.play(REASONED + FINAL, delay_s=0.005)
    queued = served.openai.responses.create(model="gpt-oss-20b", input="2+2?", background=True)
    assert queued.status == "queued"
    followed = served.http.get(f"/v1/responses/{queued.id}?stream=true").text
    events = read_sse(followed)
    assert [event["type"] for event in events][:3] == ["response.created", "response.queued", "response.in_progress"]
    assert lint(events)["status"] == "completed"
    done = served.openai.responses.retrieve(queued.id)
    assert done.output_text == "The answer is 4."
    assert served.http.get(f"/v1/responses/{queued.id}?stream=true").text == followed


def test_a_broken_stream_is_resumed_without_a_gap_or_a_difference(served):
    served.play(REASONED + FINAL, delay_s=0.01)
    seen = []
    with served.openai.responses.create(model="gpt-oss-20b", input="?", background=True, stream=True) as stream:
        for event in stream:
            seen.append(event)
            if event.type == "response.reasoning_text.delta":
                break
    response_id = seen[0].response.id
    rest = served.http.get(f"/v1/responses/{response_id}?stream=true&starting_after={seen[-1].sequence_number}").text
    whole = served.http.get(f"/v1/responses/{response_id}?stream=true").text
    assert whole.endswith(rest)
    assert len(read_sse(whole)) == len(seen) + len(read_sse(rest))
    assert lint(read_sse(whole))["status"] == "completed"


def test_a_background_response_is_cancelled_once_and_stays_so(served):
    engine = served.play(REASONED + FINAL, delay_s=0.1)
    made = served.openai.responses.create(model="gpt-oss-20b", input="?", background=True)
    while not engine.num_open:
        time.sleep(0.01)
    assert served.openai.responses.cancel(made.id).status == "cancelled"
    assert served.openai.responses.cancel(made.id).status == "cancelled"
    served.until_idle()
    events = read_sse(served.http.get(f"/v1/responses/{made.id}?stream=true").text)
    assert lint(events)["status"] == "cancelled"
    finished = create(served).json()["id"]
    assert served.http.post(f"/v1/responses/{finished}/cancel").status_code == 400


def test_deleting_a_running_background_response_stops_it(served):
    served.play(REASONED + FINAL, delay_s=0.1)
    made = served.openai.responses.create(model="gpt-oss-20b", input="?", background=True)
    assert served.http.get(f"/v1/responses/{made.id}").json()["status"] in ("queued", "in_progress")
    assert create(served, previous_response_id=made.id).status_code == 400
    assert served.http.delete(f"/v1/responses/{made.id}").json()["deleted"] is True
    assert served.http.get(f"/v1/responses/{made.id}").status_code == 404


def test_a_client_that_leaves_a_stream_frees_its_sequence(served):
    served.play(REASONED + FINAL, delay_s=0.05)
    with served.http.stream("POST", "/v1/responses", json={"input": "?", "stream": True}) as stream:
        next(stream.iter_lines())
    served.until_idle()


def test_a_client_that_leaves_while_waiting_frees_its_sequence(served):
    engine = served.play(REASONED + FINAL, delay_s=0.2)
    with pytest.raises(openai.APITimeoutError):
        served.openai.responses.create(model="gpt-oss-20b", input="?", timeout=0.3)
    assert len(engine.prompts) == 1
    served.until_idle()


def test_conversations_grow_by_their_responses(served):
    engine = served.play(REASONED + FINAL)
    conversation = served.openai.conversations.create(
        metadata={"topic": "sums"}, items=[{"type": "message", "role": "user", "content": "Call me Ida."}]
    )
    for text in ("2+2?", "3+3?"):
        made = served.openai.responses.create(model="gpt-oss-20b", input=text, conversation=conversation.id)
        assert made.conversation.id == conversation.id
    prompt = TOKENIZER.decode(engine.prompts[-1])
    assert prompt.index("Call me Ida.") < prompt.index("2+2?") < prompt.index("The answer is 4.") < prompt.index("3+3?")
    items = list(served.openai.conversations.items.list(conversation.id, order="asc", limit=2))
    assert [item.type for item in items] == ["message"] * 2 + ["reasoning", "message"] + [
        "message",
        "reasoning",
        "message",
    ]
    one = served.openai.conversations.items.retrieve(items[0].id, conversation_id=conversation.id)
    assert one.content[0].text == "Call me Ida."
    served.openai.conversations.items.delete(items[0].id, conversation_id=conversation.id)
    added = served.openai.conversations.items.create(
        conversation.id, items=[{"type": "message", "role": "user", "content": "Bye."}]
    )
    assert added.data[0].content[0].text == "Bye."
    assert served.openai.conversations.update(conversation.id, metadata={"x": "y"}).metadata == {"x": "y"}
    assert served.openai.conversations.retrieve(conversation.id).metadata == {"x": "y"}
    assert served.openai.conversations.delete(conversation.id).deleted
    with pytest.raises(openai.NotFoundError):
        served.openai.conversations.retrieve(conversation.id)


def test_a_response_whose_conversation_was_deleted_meanwhile_has_failed(served):
    served.play(REASONED + FINAL, delay_s=0.02)
    conversation = served.openai.conversations.create().id
    made = served.openai.responses.create(model="gpt-oss-20b", input="?", background=True, conversation=conversation)
    served.openai.conversations.delete(conversation)
    failed = lint(read_sse(served.http.get(f"/v1/responses/{made.id}?stream=true").text))
    assert failed["status"] == "failed" and "conversation" in failed["error"]["message"]


def test_an_item_stands_in_a_conversation_once(served):
    conversation = served.openai.conversations.create(items=[{"id": "u0", "role": "user", "content": "?"}]).id
    again = {"items": [{"id": "u0", "role": "user", "content": "??"}]}
    refused = served.http.post(f"/v1/conversations/{conversation}/items", json=again)
    assert refused.status_code == 400 and "'u0' stands there already" in refused.json()["error"]["message"]
    first = create(served).json()
    refers = [{"type": "item_reference", "id": first["output"][-1]["id"]}]
    assert create(served, input=refers).status_code == 200
    assert create(served, input=refers, previous_response_id=first["id"]).status_code == 400
    assert create(served, input=[*refers, *refers]).status_code == 400


def test_many_turns_at_once_do_not_mix(served):
    served.play(REASONED + FINAL, delay_s=0.001)
    with ThreadPoolExecutor(8) as pool:
        bodies = list(pool.map(lambda _: create(served, stream=True).text, range(16)))
    assert len({lint(read_sse(body))["id"] for body in bodies}) == 16


class Sum(BaseModel):
    value: int


def test_the_packages_helpers_parse_and_stream(served):
    served.play(REASONED + '<|channel|>final<|message|>{"value": 4}<|return|>')
    parsed = served.openai.responses.parse(model="gpt-oss-20b", input="2+2?", text_format=Sum)
    assert parsed.output_parsed == Sum(value=4)
    with served.openai.responses.stream(model="gpt-oss-20b", input="2+2?", text_format=Sum) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_parsed == Sum(value=4)
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"


def test_the_packages_stream_helper_takes_calls_behind_preambles(served):
    served.play(REASONED + PREAMBLE + CALL)
    with served.openai.responses.stream(model="gpt-oss-20b", input="2+2?", tools=[ADD], text_format=Sum) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]


def test_encrypted_reasoning_comes_back_without_the_store(served):
    engine = served.play(REASONED + CALL, FINAL)
    served.service.model.memory._turns.clear()
    first = create(served, store=False, tools=[ADD], include=["reasoning.encrypted_content"]).json()
    served.service.model.memory._turns.clear()
    thought, call = first["output"]
    hidden = {key: value for key, value in thought.items() if key != "content"}
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "4"}
    items = [{"role": "user", "content": "2+2?"}, hidden, call, output]
    assert create(served, store=False, tools=[ADD], input=items).json()["input_transformations"] == []
    assert "2 and 2 make 4." in TOKENIZER.decode(engine.prompts[-1])


def test_what_is_to_be_included_is_there_when_a_response_is_retrieved(served):
    engine = served.play(REASONED + FINAL)
    conversation = served.openai.conversations.create()
    made = served.openai.responses.create(model="gpt-oss-20b", input="2+2?", conversation=conversation.id)
    assert made.output[0].encrypted_content is None
    sealed = ["reasoning.encrypted_content"]
    again = served.openai.responses.retrieve(made.id, include=sealed).output[0]
    listed = served.openai.conversations.items.list(conversation.id, order="asc", include=sealed).data[1]
    path = f"/v1/conversations/{conversation.id}/items/{made.output[0].id}?include={sealed[0]}"
    for item in (again.to_dict(), listed.to_dict(), served.http.get(path).json()):
        hidden = {key: value for key, value in item.items() if key != "content"}
        call = {"type": "function_call", "name": "add", "call_id": "c", "arguments": "{}"}
        create(served, store=False, input=[hidden, call, {**call, "type": "function_call_output", "output": "4"}])
        assert "2 and 2 make 4." in TOKENIZER.decode(engine.prompts[-1])
    assert served.http.get(f"/v1/responses/{made.id}?include=everything").status_code == 400


def test_what_a_thought_took_is_kept_and_told_to_whoever_asks(served):
    served.play(REASONED + FINAL)
    conversation = served.openai.conversations.create()
    made = served.openai.responses.create(model="gpt-oss-20b", input="2+2?", conversation=conversation.id)
    paths = [f"/v1/responses/{made.id}", f"/v1/conversations/{conversation.id}/items/{made.output[0].id}"]
    for path in paths:
        silent, told = (served.http.get(path + asked).json() for asked in ("", "?include=reasoning.usage"))
        silent, told = (one["output"][0] if "output" in one else one for one in (silent, told))
        usage = told.pop("usage")
        assert usage["reasoning_tokens"] == made.usage.output_tokens_details.reasoning_tokens
        assert usage["seconds"] >= 0
        assert told == silent


def test_a_conversation_is_compacted_when_it_has_become_long_and_the_chain_goes_on_from_there(served):
    engine = served.play(REASONED + FINAL)
    first = create(served, input="2+2? " * 300).json()
    engine = served.play("<|channel|>final<|message|>They added 2 and 2.<|return|>", REASONED + FINAL)
    manage = [{"type": "compaction", "compact_threshold": 500}]
    fields = {"previous_response_id": first["id"], "context_management": manage}
    streamed = read_sse(create(served, input="And 3+3?", stream=True, **fields).text)
    second = lint(streamed)
    assert [item["type"] for item in second["output"]] == ["compaction", "reasoning", "message"]
    assert [e["type"] for e in streamed][2:5] == [
        "response.output_item.added", "response.compaction.compacting", "response.output_item.done",
    ]  # fmt: skip
    assert second["usage"]["input_tokens"] == len(engine.prompts[0]) + len(engine.prompts[1])
    served.play(FINAL)
    create(served, input="And 4+4?", previous_response_id=second["id"])
    for prompt, said in ((engine.prompts[-1], "And 4+4?"),):
        text = TOKENIZER.decode(prompt)
        assert text.count("They added 2 and 2.") == 1 and "2+2? 2+2?" not in text
        assert text.index("They added") < text.index("And 3+3?") < text.index("The answer is 4.") < text.index(said)
    items = [
        *first["output"],
        {"role": "user", "content": "And 3+3?"},
        *second["output"],
        {"role": "user", "content": "So?"},
    ]
    create(served, store=False, input=[{"role": "user", "content": "2+2? " * 300}, *items])
    text = TOKENIZER.decode(engine.prompts[-1])
    assert "2+2? 2+2?" not in text and text.count("And 3+3?") == 1 and text.rindex("So?") > text.index("They added")


def test_a_compaction_can_be_asked_for_by_an_item(served):
    served.play("<|channel|>final<|message|>They added 2 and 2.<|return|>")
    items = [{"role": "user", "content": "2+2?"}, {"type": "compaction_trigger"}]
    events = read_sse(create(served, input=items, stream=True).text)
    response = lint(events)
    assert [item["type"] for item in response["output"]] == ["compaction"]
    again = read_sse(served.http.get(f"/v1/responses/{response['id']}?stream=true").text)
    assert again == events
    assert create(served, input=items[::-1]).status_code == 400
    served.play("<|channel|>final<|message|><|return|>")
    failed = lint(read_sse(create(served, input=items, stream=True).text))
    assert failed["status"] == "failed" and "no summary" in failed["error"]["message"]


def test_a_prewarmed_prompt_is_read_and_nothing_is_said(served):
    engine = served.play(REASONED + FINAL)
    made = create(served, prompt_cache_options={"prewarm": True}).json()
    assert (made["status"], made["output"], made["usage"]["output_tokens"]) == ("completed", [], 0)
    assert made["usage"]["input_tokens"] == len(engine.prompts[0]) and engine.params[0].max_tokens == 1
    assert made["prompt_cache_options"] == {"prewarm": True, "mode": "implicit", "ttl": "30m"}


def test_a_conversation_can_change_its_configuration(served):
    engine = served.play(REASONED + FINAL)
    shape = {"type": "json_schema", "name": "sum", "schema": {"type": "object"}}
    update = {"type": "configuration_update", "reasoning": {"effort": "high"}, "text": {"format": shape}}
    first = create(served, input=[update, {"role": "user", "content": "2+2?"}]).json()
    assert first["reasoning"]["effort"] == "high" and first["text"]["format"]["name"] == "sum"
    create(served, previous_response_id=first["id"])
    assert "Reasoning: high" in TOKENIZER.decode(engine.prompts[1]) and "## sum" in TOKENIZER.decode(engine.prompts[1])
    create(served, previous_response_id=first["id"], reasoning={"effort": "low"})
    assert "Reasoning: low" in TOKENIZER.decode(engine.prompts[2])
    wrong = {"type": "configuration_update", "reasoning": {"effort": "enormous"}}
    assert create(served, input=[wrong]).status_code == 400


def test_deltas_are_padded_when_that_is_asked_for_and_told_again_as_they_were(served):
    padded = create(served, stream=True, stream_options={"include_obfuscation": True})
    events = read_sse(padded.text)
    deltas = [event for event in events if event["type"].endswith(".delta")]
    assert deltas and all((len(e["delta"]) + len(e["obfuscation"])) % 32 == 0 for e in deltas)
    response_id = lint(events)["id"]
    again = served.http.get(f"/v1/responses/{response_id}?stream=true&include_obfuscation=false")
    assert again.text == padded.text
    assert "obfuscation" not in create(served, stream=True).text


def test_a_picture_of_a_tool_is_told_as_left_out_and_one_of_the_user_is_refused(served):
    engine = served.play(FINAL)
    picture = [{"type": "input_image", "image_url": "data:,x"}, {"type": "input_text", "text": "a cat"}]
    call = {"type": "function_call", "name": "look", "call_id": "c", "arguments": "{}"}
    assert create(served, input=[call, {**call, "type": "function_call_output", "output": picture}]).status_code == 200
    assert "[image left out: this model reads text only]a cat" in TOKENIZER.decode(engine.prompts[-1])
    assert "text only" in create(served, input=[{"role": "user", "content": picture}]).json()["error"]["message"]


def test_every_parameter_is_echoed_and_unknown_ones_are_named(served):
    given = {
        "instructions": "Be brief.", "metadata": {"a": "b"}, "temperature": 0.5, "top_p": 0.9, "top_logprobs": 2,
        "max_output_tokens": 99, "max_tool_calls": 3, "truncation": "auto", "parallel_tool_calls": False,
        "tool_choice": "none", "tools": [{**ADD, "strict": True}], "user": "me", "safety_identifier": "x",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "store": False, "background_options": {"x": 1},
        "reasoning": {"effort": "high", "summary": "auto", "context": "all_turns", "mode": "standard"},
    }  # fmt: skip
    answer = create(served, **given, verbosity="low", novel=1, client_metadata={"x": 1})
    made = answer.json()
    assert {name: made[name] for name in given} == given
    assert answer.headers["x-ossia-ignored-fields"] == "verbosity, novel"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"temperature": 3}, 400, "temperature"),
        ({"model": "gpt-5"}, 404, "model"),
        ({"input": [{"role": "wizard"}]}, 400, "input[0].role"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"include": ["everything"]}, 400, "include"),
        ({"prompt": {"id": "p"}}, 400, "prompt"),
        ({"conversation": "conv_gone"}, 404, None),
        ({"reasoning": {"effort": "enormous"}}, 400, "reasoning.effort"),
    ],
)
def test_errors_have_the_apis_shape_and_class(served, body, status, param):
    answer = create(served, **body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"previous_response_id": "resp_gone"}, 400, "previous_response_not_found", "previous_response_id"),
        ({"previous_response_id": "\0"}, 400, "previous_response_not_found", "previous_response_id"),
        ({"model": "gpt-5"}, 404, "model_not_found", "model"),
    ],
)
def test_what_is_not_there_has_the_apis_code(served, body, status, code, param):
    answer = create(served, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"[" * 100_000, b"\xff", b'{"input": 1e999}'])
def test_a_body_that_is_no_request_is_the_clients_fault(served, body):
    headers = {"content-type": "application/json"}
    assert 400 <= served.http.post("/v1/responses", content=body, headers=headers).status_code < 500


def test_half_characters_and_nuls_do_no_harm(served):
    headers = {"content-type": "application/json"}
    body = b'{"input": [{"role": "user", "content": "a\\ud800b\\u0000"}], "metadata": {"k": "\\u0000"}}'
    made = served.http.post("/v1/responses", content=body, headers=headers)
    assert made.status_code == 200
    assert served.http.get(f"/v1/responses/{made.json()['id']}/input_items").status_code == 200
    body = b'{"input": "a\\ud800b", "instructions": "\\udfff"}'
    assert served.http.post("/v1/responses", content=body, headers=headers).status_code < 500
    assert served.http.get("/v1/responses/%00").status_code == 404


def test_ignored_tools_are_named_in_a_header(served):
    answer = create(served, tools=[{"type": "file_search"}, {"type": "image_generation"}, ADD])
    assert answer.headers["x-ossia-ignored-tools"] == "file_search, image_generation"


def test_a_failure_before_the_first_byte_is_a_status_and_after_it_an_event(serve):
    from tests.responses.scripts import Scripted

    from ossia.errors import UnavailableError

    class Failing(Scripted):
        async def _read(self, prompt, params):
            async for output in super()._read(prompt, params):
                yield output
                raise UnavailableError("the engine is gone")

    served = serve(engine=Failing(REASONED + FINAL))
    assert create(served).status_code == 503
    assert lint(read_sse(create(served, stream=True).text))["status"] == "failed"
    small = serve(engine=Scripted(FINAL, context=10))
    too_long = create(small, stream=True)
    assert too_long.status_code == 400 and too_long.json()["error"]["code"] == "context_length_exceeded"


def test_the_agents_sdk_runs_a_tool_and_answers(served):
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)

    @agents.function_tool
    def add(a: int, b: int) -> str:
        """Add."""
        return str(a + b)

    engine = served.play(REASONED + CALL, REASONED + FINAL, REASONED + CALL, REASONED + FINAL)

    async def go() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none")
        said = []
        for kind in (agents.OpenAIResponsesModel, agents.OpenAIChatCompletionsModel):
            asked = kind(model="gpt-oss-20b", openai_client=client)
            agent = agents.Agent(name="Adder", instructions="Add.", model=asked, tools=[add])
            said.append((await agents.Runner.run(agent, "2+2?")).final_output)
        streamed = agents.Runner.run_streamed(agent, "2+2?")
        async for _ in streamed.stream_events():
            pass
        await client.close()
        return [*said, streamed.final_output]

    assert asyncio.run(go()) == ["The answer is 4."] * 3
    for prompt, after in ((0, 1), (2, 3)):
        sampled = tokens(REASONED + CALL)
        assert engine.prompts[after][: len(engine.prompts[prompt]) + len(sampled)] == engine.prompts[prompt] + sampled


def test_a_request_that_does_not_say_is_sampled_as_the_checkpoint_says(tmp_path):
    named = {"temperature": 0.6, "top_k": 20}
    served = Served(model(engine=Scripted(FINAL), sampling=named), Store(f"sqlite:///{tmp_path / 'db'}"))
    client, asked = served.openai, {"model": "gpt-oss-20b"}
    hello = [{"role": "user", "content": "Hi"}]
    try:
        echoed = [
            client.responses.create(**asked, input="Hi"),
            client.responses.create(**asked, input="Hi", temperature=0),
        ]
        client.chat.completions.create(**asked, messages=hello)
        client.chat.completions.create(**asked, messages=hello, top_p=0.5, extra_body={"top_k": -1})
        client.completions.create(**asked, prompt="Hi")
        served.http.post("/v1/messages", json={**asked, "max_tokens": 9, "messages": hello}).raise_for_status()
        sampled = [(one.temperature, one.top_p, one.top_k) for one in served.engine.params]
    finally:
        served.stop()
    assert sampled == [(0.6, 1, 20), (0, 1, 20), (0.6, 1, 20), (0.6, 0.5, 0), (0.6, 1, 20), (0.6, 1, 20)]
    assert [(one.temperature, one.top_p) for one in echoed] == [(0.6, 1), (0, 1)]
