"""The loop over scripted tokens: event orders, endings, tools, and prompts that repeat what was sampled."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.responses.lint import lint
from tests.responses.scripts import CALL, FINAL, PREAMBLE, REASONED, TOKENIZER, Scripted, model, tokens

from ossia.errors import ContextLengthError, InputError, NotFoundError, UnavailableError, UnsupportedError
from ossia.harmony import Message, ToolNamespace
from ossia.responses.builder import replayed
from ossia.responses.convert import Entry, History
from ossia.responses.events import sse
from ossia.responses.loop import Extras, Run, finish
from ossia.responses.schema import ResponseRequest
from ossia.responses.tools import Toolbox, ToolResult

ADD = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}


def run_of(script: Any, *, history: History | None = None, **fields: Any) -> Run:
    extras = fields.pop("extras", None)
    made = script if not isinstance(script, str | list) else model(script)
    return Run(ResponseRequest(**{"input": "2+2?", **fields}), made, history, extras=extras)


def events_of(run: Run) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        return [event.to_dict() async for event in run.events()]

    return asyncio.run(collect())


def order(events: list[dict[str, Any]]) -> list[str]:
    """Types of events, repeated deltas as one, without the common prefix."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for i, name in enumerate(names) if not (name.endswith("delta") and i and names[i - 1] == name)]


REASONING_ORDER = [
    "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
    "output_item.done",
]  # fmt: skip
MESSAGE_ORDER = [
    "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
    "output_item.done",
]  # fmt: skip


def test_reasoning_and_text_come_in_the_official_order():
    events = events_of(run_of(REASONED + FINAL))
    assert order(events) == ["created", "in_progress", *REASONING_ORDER, *MESSAGE_ORDER, "completed"]
    response = lint(events)
    assert response["status"] == "completed"
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == len(tokens(REASONED)) - 2
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 7


def test_a_function_call_ends_the_turn_behind_its_preamble():
    events = events_of(run_of(REASONED + PREAMBLE + CALL, tools=[ADD]))
    called = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert order(events) == ["created", "in_progress", *REASONING_ORDER, *MESSAGE_ORDER, *called, "completed"]
    _, preamble, call = lint(events)["output"]
    assert preamble["phase"] == "commentary"
    assert (call["name"], call["arguments"]) == ("add", '{"a": 2, "b": 2}')


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>analysis to=functions.add <|constrain|>json<|message|>",
        " to=functions.add<|channel|>commentary json<|message|>",
        " to=functions.add<|channel|>json<|message|>",
        "<|channel|>commentary to=add<|message|>",
    ],
)
def test_a_slip_in_the_header_is_still_the_declared_call(header):
    response = lint(events_of(run_of(f'{header}{{"a": 1}}<|call|>', tools=[ADD])))
    assert [(i["type"], i["name"], i["arguments"]) for i in response["output"]] == [
        ("function_call", "add", '{"a": 1}')
    ]


def test_a_custom_tool_gets_its_text():
    script = "<|channel|>commentary to=functions.patch<|message|>*** Begin<|call|>"
    events = events_of(run_of(script, tools=[{"type": "custom", "name": "patch", "description": "Apply."}]))
    assert order(events) == [
        "created", "in_progress", "output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    assert lint(events)["output"][0]["input"] == "*** Begin"


def test_a_namespace_stays_apart_from_the_name():
    script = "<|channel|>commentary to=crm.find <|constrain|>json<|message|>{}<|call|>"
    namespace = {"type": "namespace", "name": "crm", "description": "Customers.", "tools": [{**ADD, "name": "find"}]}
    made = model(script)
    call = lint(events_of(run_of(made, tools=[namespace])))["output"][0]
    assert (call["namespace"], call["name"]) == ("crm", "find")
    assert "namespace crm {" in TOKENIZER.decode(made.engine.prompts[0])


def test_an_answer_that_is_cut_off_is_incomplete_and_says_why():
    num = len(tokens("<|channel|>final<|message|>The answer"))
    events = events_of(run_of(FINAL, max_output_tokens=num))
    response = lint(events)
    assert order(events)[-2:] == ["output_item.done", "incomplete"]
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "The answer"


def test_half_a_call_is_incomplete_and_never_called_complete():
    response = lint(events_of(run_of(CALL, tools=[ADD], max_output_tokens=len(tokens(CALL)) - 2)))
    assert response["status"] == response["output"][0]["status"] == "incomplete"


def test_a_failing_engine_ends_the_stream_as_failed():
    class Failing(Scripted):
        async def _read(self, prompt, params):
            async for output in super()._read(prompt, params):
                yield output
                raise UnavailableError("the engine is gone")

    run = run_of(model(engine=Failing(REASONED + FINAL)))
    events = events_of(run)
    assert order(events)[-1] == "failed"
    assert lint(events)["error"] == {"code": "server_error", "message": "the engine is gone"}
    assert isinstance(run.error, UnavailableError)


def test_a_fault_of_ours_ends_the_stream_as_failed_without_its_text():
    class Broken(Scripted):
        async def _read(self, prompt, params):
            raise RuntimeError("secret")
            yield

    events = events_of(run_of(model(engine=Broken(FINAL))))
    assert order(events)[-1] == "failed"
    assert "secret" not in str(lint(events)["error"])


def test_leaving_the_stream_frees_the_sequence_and_cancel_closes_what_is_open():
    made = model(REASONED + FINAL)
    run = run_of(made)

    async def leave() -> list[dict[str, Any]]:
        events = []
        stream = run.events()
        async for event in stream:
            events.append(event.to_dict())
            if event.type == "response.reasoning_text.delta":
                break
        await stream.aclose()
        return events + [event.to_dict() for event in run.cancel()]

    events = asyncio.run(leave())
    assert made.engine.num_open == 0
    cancelled = lint(events)
    assert cancelled["status"] == "cancelled"
    assert order(events)[-2:] == ["output_item.done", "incomplete"]
    # All that was sampled was of the thought that is left open.
    usage = cancelled["usage"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == usage["output_tokens"] == 4


def test_text_behind_a_call_is_not_generated():
    script = CALL.replace("<|call|>", "<|end|>") + "<|start|>assistant" + FINAL
    made = model(script)
    response = lint(events_of(run_of(made, tools=[ADD])))
    assert [item["type"] for item in response["output"]] == ["function_call"]
    assert made.engine.num_open == 0


def test_an_undeclared_tool_is_answered_to_the_model_which_goes_on():
    made = model("<|channel|>analysis to=container.exec code<|message|>ls<|call|>", FINAL)
    response = lint(events_of(run_of(made, tools=[ADD])))
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    first, second = made.engine.prompts
    sampled = tokens("<|channel|>analysis to=container.exec code<|message|>ls<|call|>")
    assert second[: len(first) + len(sampled)] == first + sampled
    assert "Unknown tool: container.exec. The tools are: functions.add." in TOKENIZER.decode(second)


def test_a_model_that_calls_undeclared_tools_for_ever_is_stopped():
    response = lint(events_of(run_of("<|channel|>analysis to=browser.search code<|message|>{}<|call|>")))
    assert len(response["output"]) == 4


class Python(Toolbox):
    """A toolbox of one tool that answers with what it was given."""

    def namespaces(self, tools):
        known = [tool for tool in tools if tool["type"] == "code_interpreter"]
        return [ToolNamespace.python()] * len(known), [tool for tool in tools if tool not in known]

    def item(self, recipient):
        return (
            {"type": "code_interpreter_call", "container_id": "c1", "outputs": None} if recipient == "python" else None
        )

    async def run(self, call: Message) -> ToolResult:
        return ToolResult(f"ran {call.text}", {"outputs": [{"type": "logs", "logs": "4"}]})


PYTHON_CALL = "<|channel|>analysis to=python code<|message|>2+2<|call|>"
INTERPRETER = {"type": "code_interpreter", "container": {"type": "auto"}}


def test_a_tool_of_ours_is_run_and_only_its_answer_is_new_to_the_engine():
    made = model(REASONED + PYTHON_CALL, FINAL, toolbox=Python)
    events = events_of(run_of(made, tools=[INTERPRETER]))
    ran = [
        "output_item.added", "code_interpreter_call.in_progress", "code_interpreter_call_code.delta",
        "code_interpreter_call_code.done", "code_interpreter_call.interpreting", "code_interpreter_call.completed",
        "output_item.done",
    ]  # fmt: skip
    assert order(events) == ["created", "in_progress", *REASONING_ORDER, *ran, *MESSAGE_ORDER, "completed"]
    response = lint(events)
    assert response["output"][1]["code"] == "2+2"
    first, second = made.engine.prompts
    sampled = tokens(REASONED + PYTHON_CALL)
    assert second[: len(first) + len(sampled)] == first + sampled
    assert TOKENIZER.decode(second[len(first) + len(sampled) :]) == (
        "<|start|>python to=assistant<|channel|>analysis<|message|>ran 2+2<|end|><|start|>assistant"
    )


def test_max_tool_calls_asks_for_an_answer_and_then_ends():
    made = model(PYTHON_CALL, toolbox=Python)
    response = lint(events_of(run_of(made, tools=[INTERPRETER], max_tool_calls=2)))
    assert response["status"] == "incomplete"
    assert [item["status"] for item in response["output"]] == ["completed", "completed", "failed", "failed"]
    assert "Give your final answer now" in TOKENIZER.decode(made.engine.prompts[3])


# Prompts that repeat what was sampled ----------------------------------------------------------------------------


def _next_history(run: Run) -> History:
    return History([*run.history.entries, *run.input, *run.output], run.current_date)


SAMPLED_ODDLY = (
    REASONED + PREAMBLE + '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a":  2}<|call|>'
)


def _answer(call: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call["call_id"], "output": "4"}


def test_the_next_prompt_is_the_prompt_and_the_sampled_tokens_of_a_pending_turn_from_the_store():
    made = model(SAMPLED_ODDLY, FINAL)
    first = run_of(made, tools=[ADD], instructions="Add.")
    events_of(first)
    assert first.is_pending
    dumped = [
        Entry(e.item, tuple(type(s).from_dict(s.to_dict()) for s in e.spoken)) for e in _next_history(first).entries
    ]
    second = run_of(
        made,
        tools=[ADD],
        instructions="Add.",
        history=History(dumped, first.current_date),
        input=[_answer(first.output[-1].item)],
    )
    events_of(second)
    prompt, after = made.engine.prompts
    sampled = tokens(SAMPLED_ODDLY)
    assert after[: len(prompt) + len(sampled)] == prompt + sampled
    assert TOKENIZER.decode(after[len(prompt) + len(sampled) :]) == (
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>4<|end|><|start|>assistant"
    )


@pytest.mark.parametrize("shown", ["everything", "without reasoning", "call alone", "encrypted", "without phase"])
def test_the_next_prompt_is_the_same_when_the_client_sends_the_history_itself(shown):
    made = model(SAMPLED_ODDLY, FINAL)
    first = run_of(made, tools=[ADD], include=["reasoning.encrypted_content"])
    events_of(first)
    output = [entry.item for entry in first.output]
    if shown == "encrypted":
        output[0] = {key: value for key, value in output[0].items() if key != "content"}
    if shown == "without phase":
        output[1] = {"role": "assistant", "content": output[1]["content"]}
    kept = {"without reasoning": output[1:], "call alone": output[2:]}.get(shown, output)
    items = [{"role": "user", "content": "2+2?"}, *kept, _answer(output[-1])]
    events_of(run_of(made, tools=[ADD], input=items))
    prompt, after = made.engine.prompts
    sampled = tokens(SAMPLED_ODDLY)
    assert after[: len(prompt) + len(sampled)] == prompt + sampled


def test_words_before_a_call_are_its_preamble_also_where_nothing_is_remembered():
    call = {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}
    items = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Let me add."}, call, _answer(call)]
    made = model(FINAL)
    events_of(run_of(made, tools=[ADD], input=items))
    prompt = TOKENIZER.decode(made.engine.prompts[0])
    assert "<|start|>assistant<|channel|>commentary<|message|>Let me add.<|end|>" in prompt


def test_a_client_that_changes_its_history_is_taken_at_its_word():
    made = model(SAMPLED_ODDLY, FINAL)
    first = run_of(made, tools=[ADD])
    events_of(first)
    output = [entry.item for entry in first.output]
    changed = {**output[0], "content": [{"type": "reasoning_text", "text": "Else."}]}
    items = [{"role": "user", "content": "2+2?"}, changed, *output[1:], _answer(output[-1])]
    events_of(run_of(made, tools=[ADD], input=items))
    assert "Else." in TOKENIZER.decode(made.engine.prompts[1])
    assert "2 and 2 make 4" not in TOKENIZER.decode(made.engine.prompts[1])


def test_calls_of_several_turns_may_be_told_before_their_answers():
    made = model(CALL)
    said: list[dict[str, Any]] = [{"role": "user", "content": "2+2?"}]
    first = asyncio.run(finish(run_of(made, input=said, tools=[ADD])))["output"][-1]
    second = asyncio.run(finish(run_of(made, input=[*said, first, _answer(first)], tools=[ADD])))["output"][-1]
    items = [*said, first, second, _answer(first), _answer(second)]
    asyncio.run(finish(run_of(made, input=items, tools=[ADD])))
    prompt = TOKENIZER.decode(made.engine.prompts[-1])
    assert prompt.count("<|call|>") == prompt.count("<|start|>functions.add to=assistant") == 2


def test_analysis_is_left_out_once_an_answer_followed_and_kept_if_all_turns_are_asked_for():
    for context, kept in (("auto", False), ("all_turns", True)):
        made = model(REASONED + FINAL)
        first = run_of(made)
        events_of(first)
        events_of(run_of(made, history=_next_history(first), input="And 3+3?", reasoning={"context": context}))
        assert ("2 and 2 make 4" in TOKENIZER.decode(made.engine.prompts[1])) == kept


def test_thoughts_that_are_left_out_since_an_answer_followed_are_named():
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    items = [thought, {"role": "assistant", "content": "4"}, {**thought, "id": "rs_2"}]
    run = run_of(FINAL, input=items)
    assert lint(events_of(run))["input_transformations"] == [
        {"id": "rs_1", "type": "reasoning", "action": "removed", "reason": "turn_boundary"}
    ]
    assert run_of(FINAL, input=items, reasoning={"context": "all_turns"}).response["input_transformations"] == []


def test_foreign_encrypted_reasoning_is_left_out_and_that_is_said():
    run = run_of(FINAL, input=[{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"}])
    assert lint(events_of(run))["input_transformations"] == [
        {"id": "rs_1", "type": "reasoning", "action": "removed", "reason": "model_mismatch"}
    ]


# What a request may be ---------------------------------------------------------------------------------------------


def test_the_effort_reaches_the_prompt():
    for effort, told in {"none": "low", "minimal": "low", "high": "high", "xhigh": "high", "max": "high"}.items():
        made = model(FINAL)
        events_of(run_of(made, reasoning={"effort": effort}))
        assert f"Reasoning: {told}" in TOKENIZER.decode(made.engine.prompts[0])


def test_leading_developer_and_system_messages_join_the_instructions():
    made = model(FINAL)
    items = [{"role": "system", "content": "B"}, {"role": "developer", "content": "C"}, {"role": "user", "content": ""}]
    events_of(run_of(made, instructions="A", input=items))
    assert "# Instructions\n\nA\n\nB\n\nC<|end|>" in TOKENIZER.decode(made.engine.prompts[0])


def test_a_schema_for_the_answer_stands_in_the_prompt_and_is_echoed():
    made = model(FINAL)
    shape = {"type": "json_schema", "name": "sum", "schema": {"type": "object"}, "strict": True}
    response = lint(events_of(run_of(made, text={"format": shape})))
    assert "# Response Formats\n\n## sum" in TOKENIZER.decode(made.engine.prompts[0])
    assert response["text"]["format"]["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"input": [{"role": "wizard", "content": "x"}]}, InputError, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, InputError, "input[0].content[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]}, InputError, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, NotFoundError, "input[0]"),
        ({"input": [{}]}, InputError, "input[0].type"),
        ({"tools": [{}]}, InputError, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, InputError, "tools[0].name"),
        ({"tools": [ADD, ADD]}, InputError, "tools"),
        ({"tool_choice": "required"}, InputError, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": [ADD]}, InputError, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}, "tools": [{"type": "file_search"}]}, InputError, "tool_choice"),
        ({"prompt": {"id": "p"}}, UnsupportedError, "prompt"),
        ({"background": True, "store": False}, InputError, "background"),
        ({"previous_response_id": "r", "conversation": "c"}, InputError, "previous_response_id"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, InputError, "text.format.schema"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, error, param):
    with pytest.raises(error) as raised:
        run_of(FINAL, **fields)
    assert raised.value.param == param


@pytest.mark.parametrize("cut", [None, 21])
def test_every_thought_tells_its_tokens_where_that_is_included_and_they_add_up(cut):
    exec_call = "<|channel|>analysis to=container.exec<|message|>ls<|call|>"
    fields = {"tools": [ADD], "max_output_tokens": cut}
    scripts = (REASONED + exec_call, REASONED + FINAL)
    run = run_of(model(*scripts), include=["reasoning.usage"], **fields)
    response = lint(events_of(run))
    thoughts = [item for item in response["output"] if item["type"] == "reasoning"]
    assert len(thoughts) == (2 if cut else 3)
    assert thoughts[0]["usage"]["reasoning_tokens"] == len(
        tokens("<|channel|>analysis<|message|>2 and 2 make 4.<|end|>")
    )
    total = sum(item["usage"]["reasoning_tokens"] for item in thoughts)
    assert total == response["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert all(item["usage"]["seconds"] >= 0 for item in thoughts)
    assert [entry.item for entry in run.output if entry.item["type"] == "reasoning"] == thoughts
    silent = lint(events_of(run_of(model(*scripts), **fields)))
    assert not any("usage" in item for item in silent["output"])


def test_unknown_fields_tools_and_items_are_passed_by():
    run = run_of(FINAL, client_metadata={"x": 1}, tools=[{"type": "file_search"}, {"type": "novel"}],
                 input=[{"type": "web_search_call", "id": "ws_1"}, {"role": "user", "content": "Hi"}])  # fmt: skip
    assert run.tools.ignored == ("file_search", "novel")
    assert lint(events_of(run))["status"] == "completed"


def test_a_reference_that_is_no_text_is_refused():
    for identity in ([1], {"id": "msg_1"}, 5):
        with pytest.raises(InputError, match=r"input\[0\].id is .*expected a short text") as caught:
            run_of(FINAL, input=[{"type": "item_reference", "id": identity}])
        assert caught.value.param == "input[0].id"


def test_an_empty_input_is_answered():
    assert lint(events_of(run_of(FINAL, input="", max_output_tokens=1)))["status"] == "incomplete"


def test_truncation_auto_leaves_out_the_oldest_turns_and_disabled_refuses():
    items = [{"role": "user", "content": f"turn {i} " + "word " * 500} for i in range(20)]
    made = model(engine=Scripted(FINAL, context=2_500))
    with pytest.raises(ContextLengthError) as raised:
        run_of(made, input=items)
    assert raised.value.param == "input"
    events_of(run_of(made, input=items, truncation="auto"))
    prompt = TOKENIZER.decode(made.engine.prompts[-1])
    assert "turn 19" in prompt and "turn 0 " not in prompt and prompt.startswith("<|start|>system")
    with pytest.raises(ContextLengthError, match="the last turn alone is too long: shorten it") as raised:
        run_of(made, input="word " * 5_000, truncation="auto")
    assert raised.value.param == "input"


def test_an_answer_that_may_be_longer_than_there_is_room_gets_the_room_there_is():
    made = model(engine=Scripted(FINAL, context=200))
    assert lint(events_of(run_of(made, max_output_tokens=100_000)))["status"] == "completed"


def test_a_summary_takes_nothing_of_what_the_answer_may_take():
    made = model(REASONED + FINAL, REASONED + FINAL, constrain=(seen := []).append)
    manage = [{"type": "compaction", "compact_threshold": 100}]
    fields = {"max_output_tokens": 8, "reasoning": {"max_tokens": 5}, "context_management": manage}
    response = lint(events_of(run_of(made, input="2+2? " * 200, **fields)))
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [params.max_tokens for params in made.engine.params] == [4_096, 8]
    assert seen[-1].max_reasoning_tokens == 5
    assert response["usage"]["output_tokens"] == len(tokens(REASONED + FINAL)) + 8


def test_a_stop_text_ends_the_answer_across_tokens_and_not_the_thoughts():
    made = model(REASONED + FINAL)
    run = run_of(made, extras=Extras(stops=("nswer is", "make")))
    response = lint(events_of(run))
    assert response["output"][0]["content"][0]["text"] == "2 and 2 make 4."
    assert response["output"][1]["content"][0]["text"] == "The a"
    assert response["status"] == "completed" and made.engine.num_open == 0


def test_what_might_have_been_a_stop_text_is_shown_in_the_end():
    run = run_of(FINAL, extras=Extras(stops=("4.5",)))
    assert lint(events_of(run))["output"][0]["content"][0]["text"] == "The answer is 4."


def test_log_probabilities_cover_the_answer_and_nothing_else():
    text = "The answer is 4. 🎼𝄞!"
    response = lint(events_of(run_of(REASONED + f"<|channel|>final<|message|>{text}<|return|>", top_logprobs=2)))
    logprobs = response["output"][1]["content"][0]["logprobs"]
    assert bytes(b for one in logprobs for b in one["bytes"]).decode() == text
    assert all(len(one["top_logprobs"]) == 2 for one in logprobs)


def test_waiting_for_the_end_gives_the_last_response_of_the_stream():
    run = run_of(REASONED + FINAL)
    response = asyncio.run(finish(run))
    assert response == lint([event.to_dict() for event in replayed(response)])


@pytest.mark.parametrize("script", [REASONED + FINAL, REASONED + PREAMBLE + CALL, REASONED + PYTHON_CALL])
def test_a_response_can_be_told_again_from_what_is_stored(script):
    made = model(script, FINAL, toolbox=Python)
    events = events_of(run_of(made, tools=[ADD, INTERPRETER]))
    again = [event.to_dict() for event in replayed(events[-1]["response"])]
    assert order(again) == order(events)
    assert lint(again) == lint(events)


def test_a_delta_is_the_same_json_however_its_bytes_are_made():
    script = REASONED + '<|channel|>final<|message|>"\\ \n\t🎼 \u2028<|return|>'
    for fields in ({}, {"top_logprobs": 2}):

        async def collect(fields: Any = fields) -> list[Any]:
            return [event async for event in run_of(script, **fields).events()]

        events = asyncio.run(collect())
        assert any(event.head for event in events)
        for event in events:
            assert json.loads(sse(event).split(b"data: ")[1]) == event.to_dict()
            assert sse(event).startswith(b"event: %b\n" % event.type.encode())
    half = next(event for event in events if event.head)
    assert b'"delta":"?"' in sse(half._replace(fields={**half.fields, "delta": "\ud800"}))
