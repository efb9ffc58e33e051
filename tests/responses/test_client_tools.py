"""Tools of the API's own that the client runs: how they are told, called, answered, and found."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.responses.lint import lint
from tests.responses.scripts import FINAL, REASONED, TOKENIZER, Scripted, model, tokens
from tests.responses.test_loop import events_of, order, run_of

from ossia.errors import InputError
from ossia.responses.builder import replayed
from ossia.responses.convert import History

SEARCH = {"type": "tool_search", "execution": "client", "description": "Find tools.", "parameters": {"type": "object"}}
HIDDEN = {"type": "function", "name": "hidden", "description": "Was not told.", "defer_loading": True}


def call(name: str, arguments: Any) -> str:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{text}<|call|>"


CALLS = {
    "apply_patch": (
        {"type": "update_file", "path": "a.py", "diff": "@@\n-1\n+2\n"},
        {"operation": {"type": "update_file", "path": "a.py", "diff": "@@\n-1\n+2\n"}},
        {"type": "apply_patch_call_output", "status": "completed", "output": "Patched."},
        "Patched.",
    ),
    "shell": (
        {"commands": ["ls -l", "pwd"], "timeout_ms": 100},
        {"action": {"commands": ["ls -l", "pwd"], "timeout_ms": 100, "max_output_length": None}},
        {
            "type": "shell_call_output",
            "output": [
                {"stdout": "a.py", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}},
                {"stdout": "", "stderr": "late", "outcome": {"type": "timeout"}},
            ],
        },
        "exit code 0\na.py\ntimed out\nstderr:\nlate",
    ),
    "local_shell": (
        {"command": ["ls"], "working_directory": "/"},
        {"action": {"type": "exec", "command": ["ls"], "env": {}, "user": None, "timeout_ms": None,
                    "working_directory": "/"}},
        {"type": "local_shell_call_output", "output": "a.py"},
        "a.py",
    ),
    "tool_search": (
        {"goal": "hide"},
        {"arguments": {"goal": "hide"}, "execution": "client"},
        {"type": "tool_search_output", "tools": [HIDDEN], "status": "completed", "execution": "client"},
        "# Tools\n\n## functions\n\nnamespace functions {\n\n// Was not told.\ntype hidden = () => any;\n\n} "
        "// namespace functions",
    ),
}  # fmt: skip
DECLARED = {name: SEARCH if name == "tool_search" else {"type": name} for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("keeps", ["the store", "the client, without memory"])
def test_a_call_is_the_apis_item_and_its_answer_continues_exactly(name, keeps):
    arguments, fields, output, told = CALLS[name]
    script = REASONED + call(name, arguments)
    made = model(script, FINAL)
    run = run_of(made, tools=[DECLARED[name]])
    response = lint(events_of(run))
    item = response["output"][-1]
    assert item["type"] == f"{name}_call" and item["status"] == "completed" and run.is_pending
    assert {key: item[key] for key in fields} == fields
    assert f"type {name} = (_: {{" in TOKENIZER.decode(made.engine.prompts[0]) or name == "tool_search"
    answered = {**output, "call_id": item["call_id"]}
    if keeps == "the store":
        history = History([*run.input, *run.output], run.current_date)
        events_of(run_of(made, tools=[DECLARED[name]], history=history, input=[answered]))
        prompt, after = made.engine.prompts
        sampled = tokens(script)
        assert after[: len(prompt) + len(sampled)] == prompt + sampled
        after = after[len(prompt) + len(sampled) :]
    else:
        made.memory._turns.clear()
        items = [{"role": "user", "content": "2+2?"}, *response["output"], answered]
        events_of(run_of(made, tools=[DECLARED[name]], input=items))
        after = made.engine.prompts[1]
        assert f"<|constrain|>json<|message|>{json.dumps(arguments)}<|call|>" in TOKENIZER.decode(after)
    assert TOKENIZER.decode(after).endswith(
        f"<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>{told}<|end|><|start|>assistant"
    )


def test_the_commands_of_a_shell_are_told_one_by_one():
    events = events_of(run_of(call("shell", CALLS["shell"][0]), tools=[{"type": "shell"}]))
    command = [f"shell_call_command.{step}" for step in ("added", "delta", "done")]
    told = ["created", "in_progress", "output_item.added", *command, *command, "output_item.done", "completed"]
    assert order(events) == told
    assert [event["command"] for event in events if event["type"].endswith("command.done")] == ["ls -l", "pwd"]
    assert order([event.to_dict() for event in replayed(lint(events))]) == told


def test_a_file_is_deleted_without_a_diff():
    script = call("apply_patch", {"type": "delete_file", "path": "a.py", "diff": ""})
    item = lint(events_of(run_of(script, tools=[{"type": "apply_patch"}])))["output"][0]
    assert item["operation"] == {"type": "delete_file", "path": "a.py"}


@pytest.mark.parametrize("name", CALLS)
def test_half_a_call_is_no_item_and_the_response_says_that_it_was_cut(name):
    script = REASONED + call(name, CALLS[name][0])
    run = run_of(script, tools=[DECLARED[name]], max_output_tokens=len(tokens(script)) - 2)
    response = lint(events_of(run))
    assert [item["type"] for item in response["output"]] == ["reasoning"]
    assert response["status"] == "incomplete" and not run.is_pending
    assert len(run.output) == 1


@pytest.mark.parametrize("arguments", ["[]", "{", '{"x": 1}'])
def test_arguments_that_are_none_are_shown_as_they_were_said(arguments):
    item = lint(events_of(run_of(call("shell", arguments), tools=[{"type": "shell"}])))["output"][0]
    assert (item["type"], item["name"], item["arguments"]) == ("function_call", "shell", arguments)


def test_what_is_deferred_is_told_when_it_has_been_found():
    space = {"type": "namespace", "name": "crm", "description": "", "tools": [{**HIDDEN, "name": "find"}]}
    made = model(call("hidden", {}), FINAL)
    tools = [SEARCH, HIDDEN, space]
    unknown = lint(events_of(run_of(made, tools=tools)))
    assert [item["type"] for item in unknown["output"]] == ["reasoning", "message"]
    assert "hidden" not in TOKENIZER.decode(made.engine.prompts[0]).replace("to=functions.hidden", "")
    made = model(call("hidden", {}))
    searched = {"type": "tool_search_call", "call_id": "c1", "arguments": {}, "execution": "client"}
    output = {"type": "tool_search_output", "call_id": "c1", "tools": [HIDDEN, space]}
    run = run_of(made, tools=tools, input=[{"role": "user", "content": "?"}, searched, output])
    assert [function.recipient for function in run.tools.callable] == [
        "functions.tool_search", "functions.hidden", "crm.find",
    ]  # fmt: skip
    assert lint(events_of(run))["output"][0]["name"] == "hidden"


def test_without_a_search_of_the_clients_everything_is_told_at_once():
    for search in ({"type": "tool_search"}, {"type": "tool_search", "execution": "server"}):
        run = run_of(FINAL, tools=[search, HIDDEN])
        assert [function.name for function in run.tools.callable] == ["hidden"]
        assert run.tools.ignored == ("tool_search",)


def test_tools_can_be_added_on_the_way():
    made = model(call("late", {}))
    late = {
        "type": "function",
        "name": "late",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    }
    added = {"type": "additional_tools", "role": "developer", "tools": [late]}
    for items in ([added, {"role": "user", "content": "?"}], [{"role": "user", "content": "?"}, added]):
        response = lint(events_of(run_of(made, input=items)))
        assert response["output"][0]["name"] == "late"
        assert "type late = (_: {" in TOKENIZER.decode(made.engine.prompts[-1])


def test_a_shell_in_a_container_is_passed_by():
    run = run_of(FINAL, tools=[{"type": "shell", "environment": {"type": "container_auto"}}])
    assert run.tools.ignored == ("shell",)


def test_a_local_shells_output_may_name_its_call_by_id():
    made = model(FINAL)
    called = {"type": "local_shell_call", "id": "x", "call_id": "x", "action": {"type": "exec", "command": ["ls"]}}
    output = {"type": "local_shell_call_output", "id": "x", "output": "a.py"}
    events_of(run_of(made, tools=[{"type": "local_shell"}], input=[called, output]))
    assert "functions.local_shell to=assistant<|channel|>commentary<|message|>a.py" in TOKENIZER.decode(
        made.engine.prompts[0]
    )


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([{"type": "shell_call", "call_id": "c"}], "input[0]"),
        ([{"type": "apply_patch_call", "operation": {}}], "input[0]"),
        ([{"type": "shell_call_output", "call_id": "c", "output": 5}], "input[0].output"),
        ([{"type": "tool_search_output", "call_id": "c", "tools": "all"}], "input"),
        ([{"type": "additional_tools"}], "input"),
    ],
)
def test_items_of_these_tools_that_are_none_are_refused(items, param):
    with pytest.raises(InputError) as raised:
        run_of(FINAL, input=items)
    assert raised.value.param == param


def test_the_engine_is_free_behind_every_one_of_them():
    made = model(engine=Scripted(*(call(name, CALLS[name][0]) for name in CALLS)))
    for _ in CALLS:
        events_of(run_of(made, tools=list(DECLARED.values())))
        assert made.engine.num_open == 0
