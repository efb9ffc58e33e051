"""A program's own agent: functions and python between question and answer, what it refuses, what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest

import ossia
from ossia.errors import ConfigError, InputError, UnavailableError
from ossia.harmony import ToolNamespace
from ossia.tools.base import ToolOutput

CLOSE = "Please close the barost up to 65."


@pytest.fixture(scope="module")
def nano():
    return ossia.load(kv_memory="64MiB", threads=1)


@pytest.fixture
def closed():
    """Limits that `close_barost` was called with."""
    return []


@pytest.fixture
def close_barost(closed):
    @ossia.tool
    def close_barost(limit: int) -> dict[str, bool]:
        """Closes the barost."""
        closed.append(limit)
        return {"ok": True}

    return close_barost


def roles(messages):
    return [f"{m.role}:{m.channel or ''}:{m.recipient or ''}" for m in messages]


def test_functions_are_called_between_question_and_answer(nano, close_barost, closed):
    with ossia.Agent(nano, tools=[close_barost], temperature=0) as agent:
        answer = agent.ask(CLOSE)
        shown = "".join(delta.text for delta in answer if delta.channel == "final")
    assert closed == [65]
    assert (answer.num_calls, answer.finish_reason) == (1, "stop")
    assert shown == answer.text != ""
    thought, call, result, final = roles(answer.messages)
    assert thought == "assistant:analysis:" and final == "assistant:final:"
    assert call == "assistant:commentary:functions.close_barost" and result == "tool:commentary:assistant"
    assert json.loads(answer.messages[2].text) == {"ok": True}
    assert agent.messages[0].text == CLOSE and agent.messages[1:] == answer.messages


def test_a_plain_function_is_a_tool(nano):
    def close_barost(limit: int) -> str:
        return "no"

    with ossia.Agent(nano, tools=[close_barost], temperature=0) as agent:
        assert agent.ask(CLOSE).read() and agent.messages[-2].text == "no"


def test_a_turn_goes_on_behind_the_tokens_that_were_sampled(nano, close_barost, monkeypatch):
    prompts, answers = [], []

    def complete(prompt, **sampling):
        prompts.append(list(prompt))
        answers.append(type(nano).complete(nano, prompt, **sampling))
        return answers[-1]

    monkeypatch.setattr(nano, "complete", complete)
    with ossia.Agent(nano, tools=[close_barost], temperature=0) as agent:
        answer = agent.ask(CLOSE)
        answer.read()
    first = prompts[0] + answers[0].token_ids
    assert prompts[1][: len(first)] == first
    assert answers[1].num_cached_tokens > 0
    assert answer.num_tokens == sum(len(one.token_ids) for one in answers)


def test_what_is_not_approved_is_not_run_and_the_model_is_told(nano, close_barost, closed):
    asked = []

    def approve(call):
        asked.append((call.recipient, json.loads(call.text)))
        return False

    with ossia.Agent(nano, tools=[close_barost], approve=approve, temperature=0) as agent:
        answer = agent.ask(CLOSE)
        answer.read()
    assert asked[0] == ("functions.close_barost", {"limit": 65})
    assert closed == [] and "declined" in answer.messages[2].text and answer.finish_reason == "stop"


def test_no_more_calls_can_be_sampled_than_are_allowed(nano, close_barost, closed):
    with ossia.Agent(nano, tools=[close_barost], max_calls=0, temperature=0) as agent:
        answer = agent.ask(CLOSE)
        assert answer.read() != ""
    assert closed == [] and answer.num_calls == 0


def test_a_conversation_goes_on_and_an_answer_that_is_left_leaves_nothing(nano):
    with ossia.Agent(nano, temperature=0) as agent:
        left = agent.ask("What is 1234 + 5678?")
        while next(left).channel != "final":
            pass
        answer = agent.ask("What is 1 + 5?", effort="low")
        assert left.finish_reason == "abort" and left.text and agent.messages == []
        answer.read()
        assert [m.text for m in agent.messages] == ["What is 1 + 5?", answer.text]
        agent.ask("What is 2 + 2?", effort="low").read()
        assert len(agent.messages) == 4
        other = ossia.Agent(nano, messages=agent.messages, temperature=0)
    other.ask("What is 2 + 3?", effort="low").read()
    assert len(other.messages) == 6 and len(agent.messages) == 4
    other.close()
    other.close()
    with pytest.raises(InputError, match="the agent is closed"):
        other.ask("Hello")
    assert nano._outputs == {}


def test_tokens_are_counted_over_the_whole_answer(nano, close_barost):
    with ossia.Agent(nano, tools=[close_barost], temperature=0) as agent:
        whole = agent.ask(CLOSE)
        whole.read()
    for most in (1, 5, whole.num_tokens // 2, whole.num_tokens - 1):
        with ossia.Agent(nano, tools=[close_barost], temperature=0, max_tokens=most) as agent:
            cut = agent.ask(CLOSE)
            cut.read()
            assert cut.finish_reason == "length" and cut.num_tokens == most
            # No call without its result stays behind: the conversation can go on.
            assert sum(m.recipient is not None for m in agent.messages) % 2 == 0
    with ossia.Agent(nano, tools=[close_barost], temperature=0, max_tokens=whole.num_tokens) as agent:
        assert agent.ask(CLOSE).read() == whole.text


def test_the_answer_behind_calls_is_in_the_schema(nano, close_barost, closed):
    schema = {
        "type": "object",
        "properties": {"done": {"type": "boolean"}},
        "required": ["done"],
        "additionalProperties": False,
    }
    with ossia.Agent(nano, tools=[close_barost], output_schema=schema, temperature=0) as agent:
        assert json.loads(agent.ask(CLOSE).read())["done"] in (True, False)


def test_tools_run_where_an_event_loop_is_running_already(nano, closed):
    async def close_barost(limit: int) -> str:
        await asyncio.sleep(0)
        closed.append(limit)
        return "ok"

    async def notebook():
        with ossia.Agent(nano, tools=[close_barost], temperature=0) as agent:
            return agent.ask(CLOSE).read()

    assert asyncio.run(notebook()) and closed == [65]


def test_ctrl_c_cancels_the_call_and_the_agent_goes_on(nano):
    cancelled = []

    async def close_barost(limit: int) -> str:
        if cancelled:
            return "ok"
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(limit)
            raise
        return "late"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ossia.Agent(nano, tools=[close_barost], temperature=0) as agent:
            answer = agent.ask(CLOSE)
            with pytest.raises(KeyboardInterrupt):
                answer.read()
            assert answer.finish_reason == "error" and agent.messages == []
            assert agent.ask(CLOSE).read() and agent.messages[-2].text == "ok"
    finally:
        signal.signal(signal.SIGINT, before)
    assert cancelled == [65]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tools": "python"}, "expected a list"),
        ({"tools": [7]}, r"tools\[0\] is 7; expected a function"),
        ({"tools": ["pyton"]}, "there is no tool 'pyton'"),
        ({"tools": ["browser"]}, "needs browser"),
        ({"max_calls": -1}, "max_calls is -1"),
        ({"max_calls": "3"}, "max_calls is '3'"),
        ({"temprature": 1}, "unknown parameter 'temprature'"),
        ({"temperature": None}, "sampling parameters cannot be used"),
        ({"adapter": "polite"}, "there is no adapter 'polite'"),
        ({"min_tokens": 5}, "min_tokens cannot be given"),
        ({"ignore_eos": True}, "ignore_eos cannot be given"),
        ({"output_schema": {"type": "object", "not": {}}}, "output_schema"),
        ({"output_schema": "json"}, "expected a JSON Schema"),
        ({"effort": "huge"}, "effort is 'huge'"),
        ({"current_date": "today"}, "expected YYYY-MM-DD"),
        ({"messages": [{"role": "developer", "content": "Hi"}], "instructions": "Be brief."}, "have one"),
    ],
)
def test_what_an_agent_cannot_be_made_of_is_told_at_once(nano, settings, match):
    with pytest.raises((InputError, ConfigError), match=match):
        ossia.Agent(nano, **settings)


def test_two_functions_of_one_name_are_refused(nano, close_barost):
    with pytest.raises(InputError, match="close_barost"):
        ossia.Agent(nano, tools=[close_barost, close_barost])


def test_python_runs_in_a_sandbox_and_keeps_its_variables(nano):
    try:
        agent = ossia.Agent(nano, tools=["python"], temperature=0)
    except UnavailableError as error:
        pytest.skip(f"no sandbox works on this machine: {error.message[:300]}")
    with agent:
        assert agent.ask("Use python to compute the factorial of 12.").read() == "479001600"
        (call,) = [m for m in agent.messages if m.recipient == "python"]
        assert "12" in call.text and agent.messages[-2].text == "479001600"


def test_a_program_that_closes_nothing_ends(tmp_path):
    program = """
import ossia

def close_barost(limit: int) -> str:
    return "ok"

agent = ossia.Agent(ossia.load(kv_memory="64MiB"), tools=[close_barost], temperature=0)
assert agent.ask("Please close the barost up to 65.").read()
for delta in agent.ask("What is 1 + 2?"):
    break
print("said")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout == "said\n"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("said", "runs"), [(True, True), (False, False)])
def test_who_approves_may_be_asynchronous(said, runs, nano, close_barost, closed):
    async def approve(call):
        await asyncio.sleep(0)
        return said

    with ossia.Agent(nano, tools=[close_barost], approve=approve, temperature=0) as agent:
        agent.ask(CLOSE).read()
    assert bool(closed) == runs


def test_an_approval_that_is_neither_yes_nor_no_is_an_error(nano, close_barost, closed):
    with (
        ossia.Agent(nano, tools=[close_barost], approve=lambda call: "no", temperature=0) as agent,
        pytest.raises(InputError, match="approve answered 'no'"),
    ):
        agent.ask(CLOSE).read()
    assert closed == [] and agent.messages == []


def test_a_limit_beyond_the_context_is_no_less_room(nano):
    def close_barost(limit: int) -> dict[str, bool]:
        return {"ok": True}

    most = nano.engine.max_context
    with ossia.Agent(nano, tools=[close_barost], temperature=0, max_tokens=most) as agent:
        answer = agent.ask(CLOSE)
        assert answer.read() and answer.finish_reason == "stop"


def test_a_result_that_is_too_long_is_told_to_the_model_and_the_conversation_goes_on(nano):
    def close_barost(limit: int) -> str:
        return "x " * 20_000

    with ossia.Agent(nano, tools=[close_barost], temperature=0) as agent:
        answer = agent.ask(CLOSE)
        answer.read()
        assert "there is no room for them" in answer.messages[2].text and answer.finish_reason == "stop"
        before = len(agent.messages)
        agent.ask("What is 2 + 2?").read()
        assert len(agent.messages) > before


def test_a_tool_that_cannot_be_closed_holds_up_no_other(nano):
    closed = []

    class Held:
        def __init__(self, name):
            self.namespace = ToolNamespace(name, "Does nothing.")

        async def run(self, name, arguments):
            return ToolOutput("")

        async def close(self):
            closed.append(self.namespace.name)
            raise RuntimeError(self.namespace.name)

    ossia.Agent(nano, tools=[Held("first"), Held("second")]).close()
    assert closed == ["first", "second"]


def test_a_header_that_was_cut_off_is_no_answer(nano, close_barost):
    with ossia.Agent(nano, tools=[close_barost], temperature=0) as agent:
        whole = agent.ask(CLOSE)
        whole.read()
    for most in range(1, whole.num_tokens):
        cut = nano.generate(CLOSE, tools=[close_barost], temperature=0, max_tokens=most)
        assert cut.read() == "" and not any(m.channel is None for m in cut.messages), most
        if cut.finish_reason == "stop":
            break


def test_an_agent_may_ask_the_model_that_it_runs_in(nano):
    def close_barost(limit: int) -> str:
        return nano.generate("What is 1234 + 5678?", temperature=0).read()

    with ossia.Agent(nano, tools=[close_barost], temperature=0) as agent:
        agent.ask(CLOSE).read()
        assert agent.messages[-2].text == "6912"
