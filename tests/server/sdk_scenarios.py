"""What people do with the openai package, against a server: `python sdk_scenarios.py URL`.

A program of its own, so that any version of the package can run it; it needs nothing of ossia. The server plays the
turns of `test_clients.py`, by the text of the last user message. Prints the scenarios that held; the first that does
not ends it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

MODEL = "gpt-oss-20b"
ADD = {
    "type": "function",
    "name": "add",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
CHAT_ADD = {"type": "function", "function": {key: value for key, value in ADD.items() if key != "type"}}
USER = [{"role": "user", "content": "sum"}]


class Sum(BaseModel):
    value: int


def text(client: OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="text", instructions="Be brief.", reasoning={"effort": "low"})
    assert made.output_text == "The answer is 4."
    assert made.usage.output_tokens_details.reasoning_tokens > 0
    streamed = client.responses.create(model=MODEL, input="text", stream=True)
    deltas = [event.delta for event in streamed if event.type == "response.output_text.delta"]
    assert "".join(deltas) == made.output_text
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "text"}])
    assert chat.choices[0].message.content == made.output_text
    assert chat.choices[0].message.reasoning == "2 and 2 make 4."
    chunks = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "text"}], stream=True, stream_options={"include_usage": True}
    )
    seen = list(chunks)
    assert "".join(c.choices[0].delta.content or "" for c in seen if c.choices) == made.output_text
    assert seen[-1].usage.completion_tokens > 0
    assert client.completions.create(model=MODEL, prompt="text", max_tokens=3).choices[0].text


def tools_by_the_store(client: OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="sum", tools=[ADD])
    call = first.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "add", {"a": 2, "b": 2})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    second = client.responses.create(model=MODEL, input=[output], previous_response_id=first.id, tools=[ADD])
    assert second.output_text == "The answer is 4."


def tools_by_the_client(client: OpenAI) -> None:
    items = list(USER)
    for _ in range(2):
        made = client.responses.create(
            model=MODEL, input=items, tools=[ADD], store=False, include=["reasoning.encrypted_content"]
        )
        items += made.output
        for item in made.output:
            if item.type == "function_call":
                total = sum(json.loads(item.arguments).values())
                items.append({"type": "function_call_output", "call_id": item.call_id, "output": str(total)})
    assert made.output_text == "The answer is 4."


def tools_in_chat(client: OpenAI) -> None:
    messages = list(USER)
    asked = client.chat.completions.create(model=MODEL, messages=messages, tools=[CHAT_ADD])
    call = asked.choices[0].message.tool_calls[0]
    messages += [asked.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "4"}]
    answered = client.chat.completions.create(model=MODEL, messages=messages, tools=[CHAT_ADD])
    assert answered.choices[0].message.content == "The answer is 4."
    with client.chat.completions.stream(model=MODEL, messages=USER, tools=[CHAT_ADD]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == {"a": 2, "b": 2}


def custom_tools(client: OpenAI) -> None:
    shape = {"type": "grammar", "syntax": "regex", "definition": ".+"}
    made = client.responses.create(
        model=MODEL, input="custom", tools=[{"type": "custom", "name": "say", "format": shape}]
    )
    assert (made.output[-1].type, made.output[-1].input) == ("custom_tool_call", "hello")


def the_apis_own_tools(client: OpenAI) -> None:
    for kind in ("shell", "apply_patch"):
        made = client.responses.create(model=MODEL, input=kind, tools=[{"type": kind}])
        call = made.output[-1]
        assert call.type == f"{kind}_call", call
        if kind == "shell":
            assert call.action.commands == ["ls"]
            output = {"type": "shell_call_output", "call_id": call.call_id, "output": [
                {"stdout": "a.py", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]}  # fmt: skip
        else:
            assert (call.operation.type, call.operation.path) == ("delete_file", "a.py")
            output = {"type": "apply_patch_call_output", "call_id": call.call_id, "status": "completed"}
        ended = client.responses.create(
            model=MODEL, input=[output], previous_response_id=made.id, tools=[{"type": kind}]
        )
        assert ended.output_text == "The answer is 4."


def turns_in_parallel(client: OpenAI) -> None:
    def turn(number: int) -> str:
        if number % 2:
            with client.responses.stream(model=MODEL, input="text") as stream:
                return stream.get_final_response().output_text
        return client.responses.create(model=MODEL, input="text").output_text

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(turn, range(16))) == {"The answer is 4."}

    async def together() -> None:
        async with AsyncOpenAI(base_url=client.base_url, api_key="none") as asynchronous:
            made = await asyncio.gather(
                *(asynchronous.responses.create(model=MODEL, input="text") for _ in range(8)),
                *(asynchronous.chat.completions.create(model=MODEL, messages=USER, tools=[CHAT_ADD]) for _ in range(8)),
            )
        assert len({one.id for one in made}) == 16

    asyncio.run(together())


def structured_output(client: OpenAI) -> None:
    assert client.responses.parse(model=MODEL, input="json", text_format=Sum).output_parsed == Sum(value=4)
    parsed = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "json"}], response_format=Sum
    )
    assert parsed.choices[0].message.parsed == Sum(value=4)
    # Together with tools: a call first, and the answer behind it. Before 3.54 the package took a preamble for JSON.
    knows_phases = tuple(map(int, openai.__version__.split(".")[:2])) >= (3, 54)
    asked = "json after a sum" if knows_phases else "json after a silent sum"
    first = client.responses.parse(model=MODEL, input=asked, text_format=Sum, tools=[ADD])
    assert first.output_parsed is None and first.output[-1].parsed_arguments == {"a": 2, "b": 2}
    output = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "4"}
    second = client.responses.parse(
        model=MODEL, input=[output], previous_response_id=first.id, text_format=Sum, tools=[ADD]
    )
    assert second.output_parsed == Sum(value=4)


def the_streaming_helper(client: OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="json", text_format=Sum) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_parsed == Sum(value=4)
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    with client.responses.stream(model=MODEL, input="sum", tools=[ADD]) as stream:
        done = [event for event in stream if event.type == "response.function_call_arguments.done"]
    assert json.loads(done[0].arguments) == {"a": 2, "b": 2}


def in_the_background(client: OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="slow", background=True)
    assert made.status in ("queued", "in_progress")
    for _ in range(400):
        made = client.responses.retrieve(made.id)
        if made.status not in ("queued", "in_progress"):
            break
        time.sleep(0.02)
    assert made.output_text == "The answer is 4."
    stream = client.responses.create(model=MODEL, input="slow", background=True, stream=True)
    seen = []
    for event in stream:
        seen.append(event)
        if event.type == "response.reasoning_text.delta":
            break
    stream.close()
    rest = client.responses.retrieve(seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number)
    seen += list(rest)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[-1].response.output_text == "The answer is 4."
    begun = client.responses.create(model=MODEL, input="slow", background=True)
    assert client.responses.cancel(begun.id).status == "cancelled"


def conversations(client: OpenAI) -> None:
    conversation = client.conversations.create(metadata={"topic": "sums"})
    for _ in range(2):
        client.responses.create(model=MODEL, input="text", conversation=conversation.id)
    items = client.conversations.items.list(conversation.id, order="asc").data
    assert [item.type for item in items] == ["message", "reasoning", "message"] * 2
    assert client.conversations.retrieve(conversation.id).metadata == {"topic": "sums"}
    client.conversations.delete(conversation.id)


def what_was_stored(client: OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="text")
    assert client.responses.input_items.list(made.id).data[0].content[0].text == "text"
    assert client.responses.input_tokens.count(model=MODEL, input="text").input_tokens == made.usage.input_tokens
    client.responses.delete(made.id)
    assert client.responses.compact(model=MODEL, input="text").output[-1].type == "compaction"
    chat = client.chat.completions.create(model=MODEL, messages=USER, store=True, tools=[CHAT_ADD])
    assert client.chat.completions.retrieve(chat.id).id == chat.id
    client.chat.completions.delete(chat.id)
    assert MODEL in [model.id for model in client.models.list()]


def errors(client: OpenAI) -> None:
    for wrong, fields in (
        (openai.BadRequestError, {"temperature": 9}),
        (openai.NotFoundError, {"model": "gpt-5"}),
        (openai.BadRequestError, {"previous_response_id": "resp_gone"}),
        (openai.BadRequestError, {"tool_choice": "required"}),
    ):
        try:
            client.responses.create(**{"model": MODEL, "input": "text", **fields})
        except wrong as error:
            assert error.request_id and error.body["message"]
        else:
            raise AssertionError(f"{fields} was accepted")


SCENARIOS = (
    text, tools_by_the_store, tools_by_the_client, tools_in_chat, custom_tools, the_apis_own_tools, turns_in_parallel,
    structured_output, the_streaming_helper, in_the_background, conversations, what_was_stored, errors,
)  # fmt: skip


def main() -> None:
    with OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0, timeout=30) as client:
        for scenario in SCENARIOS:
            scenario(client)
            print(openai.__version__, scenario.__name__, flush=True)


if __name__ == "__main__":
    main()
