"""Messages as values, and as JSON."""

import json
from typing import Any

import pytest

from ossia.errors import InputError
from ossia.harmony import (
    Channel,
    Conversation,
    DeveloperContent,
    Effort,
    Message,
    ResponseFormat,
    Role,
    SystemContent,
    ToolDescription,
    ToolNamespace,
)

CALL = Message(
    Role.ASSISTANT,
    "{}",
    channel=Channel.COMMENTARY,
    recipient="functions.f",
    content_type="<|constrain|>json",
)
CONVERSATION = Conversation(
    (
        Message(
            Role.SYSTEM,
            SystemContent(
                current_date="2025-06-28",
                effort=Effort.HIGH,
                knowledge_cutoff=None,
                tools=(ToolNamespace.browser(), ToolNamespace.python()),
                channels=("final",),
                channel_required=False,
            ),
        ),
        Message(
            Role.DEVELOPER,
            DeveloperContent(
                "Be brief.",
                (ToolNamespace.functions([ToolDescription("f", "Does f.", {"type": "object"}), ToolDescription("g")]),),
                (ResponseFormat("answer", {"type": "string"}, "One word."),),
            ),
        ),
        Message(Role.USER, ("two", "parts"), name="eve"),
        Message(Role.ASSISTANT, "hm", channel="analysis"),
        CALL,
        Message(Role.TOOL, "4", name="functions.f", recipient="assistant", channel="commentary"),
        Message(Role.ASSISTANT, ()),
    )
)


def test_conversation_comes_back_from_its_json() -> None:
    assert Conversation.from_json(CONVERSATION.to_json()) == CONVERSATION
    assert Conversation.from_dict(CONVERSATION.to_dict()["messages"]) == CONVERSATION
    assert len(CONVERSATION) == 7


def test_json_says_only_what_differs_from_the_defaults() -> None:
    assert CALL.to_dict() == {
        "role": "assistant",
        "channel": "commentary",
        "recipient": "functions.f",
        "content_type": "<|constrain|>json",
        "content": "{}",
    }
    assert Message("system", SystemContent(effort=Effort.LOW)).to_dict()["content"] == {"effort": "low"}
    assert json.loads(CONVERSATION.to_json())["messages"][2]["content"] == ["two", "parts"]


def test_tool_named_alone_is_the_trained_one() -> None:
    data = {"role": "system", "content": {"tools": [{"name": "browser"}, {"name": "python"}, {"name": "other"}]}}
    (content,) = Message.from_dict(data).content
    assert isinstance(content, SystemContent)
    assert content.tools == (ToolNamespace.browser(), ToolNamespace.python(), ToolNamespace("other"))


def test_content_may_be_given_as_one_part_or_several() -> None:
    assert Message("user", "a").content == ("a",)
    assert Message("user", ["a", "b"]).text == "ab"
    assert Message.from_dict({"role": "user", "content": [{"type": "text", "text": "a"}]}) == Message("user", "a")
    assert Message.from_dict({"role": "user"}) == Message("user")


@pytest.mark.parametrize(
    ("data", "where", "told"),
    [
        (7, "conversation", "conversation is 7; expected an object"),
        ({"messages": {}}, "messages", "messages is {}; expected a list of messages"),
        ({"mesages": []}, "conversation", "conversation has no 'messages'"),
        ([{"content": "x"}], "messages[0]", "messages[0] has no 'role'; expected it beside ['content']"),
        ([{"role": "bot"}], "messages[0].role", "'bot'; expected one of system, developer, user, assistant, tool"),
        ([{"role": []}], "messages[0].role", "is []; expected one of system"),
        ([{"role": "user", "contents": ""}], "messages[0].contents", "messages[0] has 'contents'; expected only"),
        ([{"role": "user", "content": 3}], "messages[0].content", "messages[0].content is 3; expected a text"),
        ([{"role": "user", "content": [None]}], "messages[0].content[0]", "is None; expected a text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]", "has no 'text'"),
        ([{"role": "user", "content": "", "name": 1}], "messages[0].name", "is 1; expected a text"),
        ([{"role": "tool", "content": ""}], "messages[0]", "a tool message without a name"),
        ([{"role": "system", "content": {"effort": "max"}}], "messages[0].content.effort", "one of low, medium, high"),
        ([{"role": "system", "content": {"efort": "low"}}], "messages[0].content.efort", "has 'efort'"),
        ([{"role": "system", "content": {"current_date": 1}}], "messages[0].content.current_date", "expected a text"),
        ([{"role": "system", "content": {"channels": "x"}}], "messages[0].content.channels", "expected a list"),
        (
            [{"role": "system", "content": {"channel_required": 1}}],
            "messages[0].content.channel_required",
            "is 1; expected true or false",
        ),
        ([{"role": "system", "content": {"tools": [{}]}}], "messages[0].content.tools[0]", "has no 'name'"),
        (
            [{"role": "developer", "content": {"tools": [{"name": "a"}, {"name": "a"}]}}],
            "messages[0].content.tools",
            "two tool namespaces are named 'a'",
        ),
        (
            [{"role": "developer", "content": {"tools": [{"name": "a", "tools": [{"name": "f", "parameters": 1}]}]}}],
            "messages[0].content.tools[0].tools[0].parameters",
            "expected a JSON Schema object or null",
        ),
        (
            [{"role": "developer", "content": {"response_formats": [{"name": "a", "schema": True}]}}],
            "messages[0].content.response_formats[0].schema",
            "is True; expected a JSON Schema object",
        ),
    ],
)
def test_bad_json_is_told_with_its_place_and_what_was_expected(data: Any, where: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        Conversation.from_dict(data)
    assert told in error.value.message
    assert error.value.param == where


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_text_that_is_no_json_is_told(text: str) -> None:
    with pytest.raises(InputError, match="the conversation is not JSON"):
        Conversation.from_json(text)


def test_content_of_another_role_is_refused() -> None:
    with pytest.raises(InputError, match="system content in a user message"):
        Message("user", SystemContent())
    with pytest.raises(InputError, match="developer content in a system message"):
        Message("system", DeveloperContent())
    with pytest.raises(InputError, match="role is 'bot'; expected one of system"):
        Message("bot", "x")
    with pytest.raises(InputError, match="effort is 'max'"):
        SystemContent(effort="max")  # type: ignore[arg-type]
