"""A real engine behind the server: random weights under grammars, the prefix cache, stop texts, refusals."""

from __future__ import annotations

import json
import re
import time

import jsonschema
import openai
import pytest
from tests.server.conftest import Served

from ossia.config import Config
from ossia.engine import AsyncEngine
from ossia.engine.masks import GrammarCompiler
from ossia.local import LocalModel
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.responses.constrain import Grammars
from ossia.responses.loop import Model
from ossia.server.limits import Admission
from ossia.server.store import Store

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
    "required": ["a", "ok"],
    "additionalProperties": False,
}
ADD = {"type": "function", "name": "add", "parameters": SCHEMA, "strict": True}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = write_random_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "tiny")
    local = LocalModel.open(Config(model=str(folder)))
    engine = AsyncEngine(local.engine)
    made = Model("tiny", engine, local.tokenizer, constrain=Grammars(GrammarCompiler(local.tokenizer)))
    served = Served(made, Store("sqlite://"), admission=Admission(64, 64))
    served.service.watch(engine.stats)
    yield served
    served.stop()
    engine.close()


def ask(real, **fields):
    fields = {"reasoning": {"max_tokens": 4}, "max_output_tokens": 60, **fields}
    return real.http.post("/v1/responses", json={"input": "Hi", **fields}, timeout=60).json()


def test_a_required_strict_call_is_made_and_valid_whatever_the_weights(real):
    made = ask(real, tools=[ADD], tool_choice="required")
    if made["status"] == "completed":
        call = made["output"][-1]
        assert call["type"] == "function_call"
        jsonschema.validate(json.loads(call["arguments"]), SCHEMA)
    say = {"type": "custom", "name": "say", "format": {"type": "grammar", "syntax": "regex", "definition": "yes|no"}}
    named = ask(real, tools=[ADD, say], tool_choice={"type": "custom", "name": "say"}, parallel_tool_calls=True)
    if named["status"] == "completed":
        assert named["output"][-1]["input"] in ("yes", "no")


def test_a_strict_answer_is_valid_beside_tools(real):
    shape = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    made = ask(real, tools=[ADD], tool_choice="none", text=shape)
    texts = [i["content"][0]["text"] for i in made["output"] if i["type"] == "message" and i["status"] == "completed"]
    assert made["status"] == "incomplete" or len(texts) == 1
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("streams", [False, True])
def test_places_of_echoed_tokens_are_those_in_the_text(real, streams):
    asked = {"prompt": "What is 12é🎼?", "max_tokens": 3, "echo": True, "logprobs": 1, "temperature": 0}
    answer = real.http.post("/v1/completions", json={**asked, "stream": streams}, timeout=60)
    if streams:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [chunk["choices"][0] for chunk in chunks]
    else:
        choices = answer.json()["choices"]
    assert choices[0]["text"].startswith(asked["prompt"])
    text = "".join(choice["text"] for choice in choices)
    told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    tokens, offsets = ([value for one in told for value in one[name]] for name in ("tokens", "text_offset"))
    assert offsets[0] == 0 and offsets == sorted(offsets)
    for token, place in zip(tokens, offsets, strict=True):
        # Tokens that are a part of a character have no text of their own.
        assert token.startswith("bytes:") or token.startswith("<|") or text.startswith(token, place)
    likeliest = [value for one in told for value in one["top_logprobs"]]
    assert likeliest[0] is None
    assert all(token in top for token, top in zip(tokens[1:], likeliest[1:], strict=True))


def test_an_answer_of_a_few_words_is_one_of_them(real):
    body = {"messages": [{"role": "user", "content": "Hi"}], "guided_choice": ["yes", "no"], "max_tokens": 40}
    made = real.http.post("/v1/chat/completions", json={**body, "reasoning": {"max_tokens": 1}}, timeout=60).json()
    choice = made["choices"][0]
    assert choice["finish_reason"] == "length" or choice["message"]["content"] in ("yes", "no")


def counted(real) -> list[float]:
    text = real.http.get("/metrics").text
    return [float(re.search(rf"^ossia_{name}_tokens_total (\S+)$", text, re.MULTILINE)[1])
            for name in ("drafted", "accepted")]  # fmt: skip


def test_what_is_computed_ahead_is_counted(real):
    begin = counted(real)
    # One token, again and again.
    asked = {"prompt": "Hi", "max_tokens": 60, "temperature": 0, "logit_bias": {"100": 100}}
    assert real.http.post("/v1/completions", json=asked, timeout=60).json()["usage"]["completion_tokens"] == 60
    drafted, accepted = (after - before for before, after in zip(begin, counted(real), strict=True))
    assert 40 < accepted <= drafted < 60


def test_what_cannot_be_enforced_is_refused_by_feature_and_place(real):
    wrong = {**ADD, "parameters": {"type": "object", "properties": {"a": {"$ref": "http://elsewhere/x"}}}}
    with pytest.raises(openai.BadRequestError) as raised:
        real.openai.responses.create(model="tiny", input="Hi", tools=[wrong])
    assert raised.value.param.startswith("tools[0]")


def test_the_next_turn_finds_its_prompt_in_the_cache(real):
    for _ in range(20):
        made = ask(real, tools=[ADD], tool_choice="required")
        if made["status"] == "completed":
            break
    output = {"type": "function_call_output", "call_id": made["output"][-1]["call_id"], "output": "4"}
    after = ask(real, tools=[ADD], previous_response_id=made["id"], input=[output], max_output_tokens=5)
    known = made["usage"]["total_tokens"]
    assert after["usage"]["input_tokens_details"]["cached_tokens"] >= known - 32 - 1


def test_a_stop_text_ends_a_raw_completion(real):
    made = real.openai.completions.create(model="tiny", prompt="Hi", max_tokens=30, seed=1)
    text = made.choices[0].text
    stop = text[5:8]
    cut = real.openai.completions.create(model="tiny", prompt="Hi", max_tokens=30, seed=1, stop=stop)
    assert cut.choices[0].text == text[: text.index(stop)]
    parts = real.openai.completions.create(model="tiny", prompt="Hi", max_tokens=30, seed=1, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in parts) == cut.choices[0].text


def _until_free(real):
    stats, give_up_s = real.engine.stats, time.monotonic() + 60
    while time.monotonic() < give_up_s:
        if not real.service.admission.num_running and not stats().num_running and not stats().num_waiting:
            assert stats().num_free_full_blocks == stats().num_full_blocks
            assert stats().num_free_window_blocks == stats().num_window_blocks
            return
        time.sleep(0.05)
    raise AssertionError("a sequence was not freed")


def test_every_block_is_free_when_clients_have_left(real):
    with real.http.stream("POST", "/v1/responses", json={"input": "Hi", "stream": True}) as stream:
        next(stream.iter_lines())
    _until_free(real)


def test_the_tokens_of_a_prompt_are_scored_as_those_that_are_sampled(real):
    def complete(**fields):
        body = {"model": "tiny", "temperature": 0, "return_token_ids": True, **fields}
        return real.http.post("/v1/completions", json=body, timeout=60).json()["choices"][0]

    prompt = [3, 14, 159, 265, 358]
    sampled = complete(prompt=prompt, max_tokens=3, logprobs=2, return_tokens_as_token_ids=True)
    assert sampled["prompt_token_ids"] == prompt
    ids, logprobs = sampled["token_ids"], sampled["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{one}" for one in ids]
    assert len(logprobs["top_logprobs"][0]) == 2
    both = [*prompt, *ids]
    scored = complete(prompt=both, max_tokens=1, prompt_logprobs=2)
    assert len(scored["prompt_logprobs"]) == len(both) and scored["prompt_logprobs"][0] is None
    for token_id, told, logprob in zip(ids, scored["prompt_logprobs"][-3:], logprobs["token_logprobs"], strict=True):
        assert told[str(token_id)]["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert told[str(token_id)]["rank"] == 1 and len(told) == 2
    # As other clients ask: no answer, the prompt once more, with what is known of its tokens.
    echoed = complete(prompt=both, max_tokens=0, echo=True, logprobs=1)
    assert echoed["logprobs"]["token_logprobs"][0] is None
    assert echoed["logprobs"]["token_logprobs"][-3:] == pytest.approx(logprobs["token_logprobs"], abs=1e-4)
    assert echoed["token_ids"] == [] and echoed["finish_reason"] == "length"
