"""Reading what models really emit: every malformation that other servers' users have reported, and a fuzz."""

import random
from typing import Any

import pytest

from ossia.harmony import (
    Channel,
    Delta,
    Effort,
    Header,
    Malformed,
    Message,
    ParsedMessage,
    Role,
    StreamParser,
    SystemContent,
    Tokenizer,
    render_for_completion,
    render_message,
)


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of ``text`` in which ``<|name|>`` is the special token: what a model samples."""
    tokens: list[int] = []
    while text:
        before, marker, text = text.partition("<|")
        tokens += tokenizer.encode(before)
        if marker:
            name, _, text = text.partition("|>")
            tokens.append(tokenizer.special(f"<|{name}|>"))
    return tokens


def parse(tokenizer: Tokenizer, text: str, role: str | None = "assistant") -> StreamParser:
    parser = StreamParser(tokenizer, role)
    parser.feed_all(tokens_of(tokenizer, text))
    parser.close()
    return parser


def short(message: ParsedMessage) -> tuple[str | None, ...]:
    return message.channel, message.recipient, message.content_type, message.text


CALL = ("commentary", "functions.f", "<|constrain|>json", "{}")

READ = {
    # Well formed.
    "<|channel|>final<|message|>hi<|return|>": [("final", None, None, "hi")],
    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>": [CALL],
    "<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>": [CALL],
    " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>": [CALL],
    "assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>": [CALL],
    "<|channel|>commentary to=functions.f json<|message|>{}<|call|>": [("commentary", "functions.f", "json", "{}")],
    "<|channel|>analysis to=python code<|message|>1<|call|>": [("analysis", "python", "code", "1")],
    "<|message|>hi<|return|>": [(None, None, None, "hi")],
    # Nothing known declares it, and it is read all the same.
    "<|channel|>commentary to=container.exec code<|message|>{}<|call|>": [
        ("commentary", "container.exec", "code", "{}")
    ],
    "<|channel|>analysis to=repo_browser.open_file code<|message|>{}<|call|>": [
        ("analysis", "repo_browser.open_file", "code", "{}")
    ],
    "<|channel|>analysis to=functions.f <|constrain|>json<|message|>{}<|call|>": [
        ("analysis", "functions.f", "<|constrain|>json", "{}")
    ],
    "<|channel|>commentary<|message|>First this.<|end|>": [("commentary", None, None, "First this.")],
    # Words too many in the header.
    "<|channel|>commentary to=functions.f json extra<|message|>{}<|call|>": [
        ("commentary", "functions.f", "json", "{}")
    ],
    "<|channel|>commentary code to=functions.f<|message|>{}<|call|>": [("commentary", "functions.f", "code", "{}")],
    "<|channel|>commentary to=functions.f to=functions.g<|message|>{}<|call|>": [
        ("commentary", "functions.f", None, "{}")
    ],
    "<|channel|>commentary to=functions.f <|constrain|>json<|constrain|>json<|message|>{}<|call|>": [
        ("commentary", "functions.f", "<|constrain|>json", "{}")
    ],
    # A content type without a recipient is none.
    "<|channel|>final <|constrain|>json<|message|>{}<|return|>": [("final", None, "<|constrain|>json", "{}")],
    "<|channel|>final<|constrain|>json<|message|>{}<|return|>": [("final", None, "<|constrain|>json", "{}")],
    "<|channel|>final json<|message|>{}<|return|>": [("final", None, "json", "{}")],
    "<|channel|>final browser.open<|message|>{}<|return|>": [("final", None, "browser.open", "{}")],
    "<|channel|>analysis code<|message|>1<|call|>": [("analysis", None, "code", "1")],
    "<|channel|>commentary functions.f <|constrain|>json<|message|>{}<|call|>": [CALL],
    "<|channel|>commentary functions.f<|message|>{}<|call|>": [("commentary", "functions.f", None, "{}")],
    "<|channel|>commentary functions.f json<|message|>{}<|call|>": [("commentary", "functions.f", "json", "{}")],
    "<|channel|>commentary <|constrain|> json<|message|>{}<|end|>": [("commentary", None, "<|constrain|>json", "{}")],
    "<|channel|>commentary <|constrain|><|message|>{}<|end|>": [("commentary", None, "<|constrain|>", "{}")],
    # Glued.
    "<|channel|>commentary to=functions.f<|channel|>json<|message|>{}<|call|>": [
        ("commentary", "functions.f", "json", "{}")
    ],
    " to=functions.f<|channel|>json<|message|>{}<|call|>": [(None, "functions.f", "json", "{}")],
    " to=functions.f<|channel|>commentary<|channel|>commentary<|message|>{}<|call|>": [
        ("commentary", "functions.f", None, "{}")
    ],
    "<|channel|>analysis<|channel|>final<|message|>hi<|return|>": [("final", None, None, "hi")],
    "<|channel|>thoughts<|channel|>ideas<|message|>hi<|end|>": [("thoughts", None, "ideas", "hi")],
    "<|channel|>commentaryto=functions.f<|message|>{}<|call|>": [("commentary", "functions.f", None, "{}")],
    "<|channel|>commentary to= functions.f<|message|>{}<|call|>": [("commentary", "functions.f", None, "{}")],
    "<|channel|> final<|message|>hi<|return|>": [("final", None, None, "hi")],
    "<|channel|><|message|>hi<|return|>": [(None, None, None, "hi")],
    "<|channel|> to=functions.f<|message|>{}<|call|>": [(None, "functions.f", None, "{}")],
    "commentary to=functions.f json<|message|>{}<|call|>": [("commentary", "functions.f", "json", "{}")],
    "<|channel|>final<|reserved_200013|><|message|>hi<|return|>": [("final", None, None, "hi")],
    # <|message|> is missing.
    "Hello there": [("final", None, None, "Hello there")],
    "Hello there<|return|>": [("final", None, None, "Hello there")],
    " Hello": [("final", None, None, " Hello")],
    "to": [("final", None, None, "to")],
    "assist": [("final", None, None, "assist")],
    "<|channel|>final Hello world<|return|>": [("final", None, None, "Hello world")],
    "<|channel|>finalHello world<|return|>": [("final", None, None, "Hello world")],
    "<|channel|>final": [("final", None, None, "")],
    "<|channel|>analysis We need\nto think": [("analysis", None, None, "We need\nto think")],
    "<|channel|>analysis one two three four five six seven eight": [
        ("analysis", None, None, "one two three four five six seven eight")
    ],
    '<|channel|>commentary to=functions.f <|constrain|>json{"a":1}<|call|>': [
        ("commentary", "functions.f", "<|constrain|>json", '{"a":1}')
    ],
    '<|channel|>commentary to=functions.f{"a":1}<|call|>': [("commentary", "functions.f", None, '{"a":1}')],
    "<|channel|>analysis to=python code print(1)<|call|>": [("analysis", "python", "code", "print(1)")],
    "<|channel|>final<|reserved_200013|>hi<|return|>": [("final", None, None, "hi")],
    "<|end|>": [("final", None, None, "")],
    # <|end|> or <|start|> is missing.
    "<|channel|>analysis<|message|>a<|channel|>final<|message|>b<|return|>": [
        ("analysis", None, None, "a"),
        ("final", None, None, "b"),
    ],
    "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>b<|return|>": [
        ("analysis", None, None, "a"),
        ("final", None, None, "b"),
    ],
    "<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>b<|return|>": [
        ("analysis", None, None, "a"),
        ("final", None, None, "b"),
    ],
    "<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b<|return|>": [
        ("analysis", None, None, "a"),
        ("final", None, None, "b"),
    ],
    "<|channel|>analysis<|message|>a<|end|>commentary to=functions.f json<|message|>{}<|call|>": [
        ("analysis", None, None, "a"),
        ("commentary", "functions.f", "json", "{}"),
    ],
    "<|channel|>analysis<|message|>a<|end|><|start|>assistantcommentary to=functions.f<|message|>{}<|call|>": [
        ("analysis", None, None, "a"),
        ("commentary", "functions.f", None, "{}"),
    ],
    "<|channel|>analysis<|message|>a<|end|><|start|>assistantto=functions.f<|channel|>commentary<|message|>{}": [
        ("analysis", None, None, "a"),
        ("commentary", "functions.f", None, "{}"),
    ],
    "<|channel|>analysis<|message|>a<|end|><|start|><|channel|>final<|message|>b": [
        ("analysis", None, None, "a"),
        ("final", None, None, "b"),
    ],
    "<|channel|>analysis<|message|>a<|end|><|start|>final<|message|>b": [
        ("analysis", None, None, "a"),
        ("final", None, None, "b"),
    ],
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant final answer: yes, it is": [
        ("analysis", None, None, "a"),
        ("final", None, None, "final answer: yes, it is"),
    ],
    # Behind a stop.
    "<|channel|>final<|message|>a<|return|>stray text": [
        ("final", None, None, "a"),
        ("final", None, None, "stray text"),
    ],
    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|> and so on": [
        CALL,
        ("final", None, None, " and so on"),
    ],
    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|><|call|><|call|>": [CALL],
    "<|channel|>final<|message|>a<|return|><|endoftext|>": [("final", None, None, "a")],
    "<|channel|>final<|message|>a<|endoftext|>": [("final", None, None, "a")],
    "<|channel|>analysis<|message|>a<|end|><|end|><|start|>assistant<|channel|>final<|message|>b": [
        ("analysis", None, None, "a"),
        ("final", None, None, "b"),
    ],
    # Special tokens inside content.
    "<|channel|>final<|message|>a<|message|>b<|constrain|>c<|reserved_200013|>d<|return|>": [
        ("final", None, None, "abcd")
    ],
    # A completion that begins with the prompt's last tokens once more.
    "<|start|>assistant<|channel|>final<|message|>a": [("final", None, None, "a")],
    "<|start|><|start|>assistant<|channel|>final<|message|>a": [("final", None, None, "a")],
    "": [],
}


@pytest.mark.parametrize(
    "text", [" to=assistant<|channel|>commentary<|message|>4<|end|>", "<|end|>", "<|message|>4", ""]
)
def test_the_message_of_a_tool_that_is_not_named_is_read(tokenizer: Tokenizer, text: str) -> None:
    messages = parse(tokenizer, text, "tool").messages
    assert [(message.role, message.name) for message in messages] == [(Role.TOOL, "tool")] * bool(text)


@pytest.mark.parametrize("text", READ, ids=list(READ))
def test_header_is_read_or_recovered(tokenizer: Tokenizer, text: str) -> None:
    parser = parse(tokenizer, text)
    assert [short(message) for message in parser.messages] == READ[text]
    assert all(message.role is Role.ASSISTANT for message in parser.messages)
    assert [token for message in parser.messages for token in message.token_ids] == tokens_of(tokenizer, text)


WHOLE = {
    "<|start|>user<|message|>hi<|end|>": (Role.USER, None, None),
    "<|start|>user:eve<|message|>hi<|end|>": (Role.USER, "eve", None),
    "<|start|>user:eve to=assistant<|message|>hi<|end|>": (Role.USER, "eve", "assistant"),
    "<|start|>user hi<|end|>": (Role.USER, None, None),
    "<|start|>functions.f to=assistant<|channel|>commentary<|message|>hi<|end|>": (
        Role.TOOL,
        "functions.f",
        "assistant",
    ),
    "<|start|>functions.f<|channel|>commentary<|message|>hi<|end|>": (Role.TOOL, "functions.f", None),
    "<|start|>functions.f to=assistant hi<|end|>": (Role.TOOL, "functions.f", "assistant"),
    "<|start|>functions.f<|message|>hi<|end|>": (Role.TOOL, "functions.f", None),
    "<|start|>tool<|message|>hi<|end|>": (Role.TOOL, "tool", None),
    "<|start|>toolto=assistant<|message|>hi<|end|>": (Role.TOOL, "tool", "assistant"),
    "<|start|>to=functions.f<|message|>hi<|end|>": (Role.ASSISTANT, None, "functions.f"),
    "<|start|><|message|>hi<|end|>": (Role.ASSISTANT, None, None),
    "<|message|>hi<|end|>": (Role.ASSISTANT, None, None),
    "hi": (Role.ASSISTANT, None, None),
}


@pytest.mark.parametrize("text", WHOLE, ids=list(WHOLE))
def test_author_is_read_where_a_message_begins_with_start(tokenizer: Tokenizer, text: str) -> None:
    (message,) = parse(tokenizer, text, None).messages
    assert (message.role, message.name, message.recipient) == WHOLE[text]
    assert message.text == "hi"


def test_only_stops_and_no_message_make_one_empty_message(tokenizer: Tokenizer) -> None:
    (message,) = parse(tokenizer, "<|end|><|call|>", None).messages
    assert (message.text, message.token_ids) == ("", (200007, 200012))


def test_stray_stops_belong_to_the_message_that_follows(tokenizer: Tokenizer) -> None:
    parser = parse(tokenizer, "<|channel|>final<|message|>a<|end|><|end|><|start|>assistant<|message|>b")
    first, second = parser.messages
    assert (first.stop, first.start, first.defects) == ("<|end|>", 0, ())
    assert (second.stop, second.start, second.token_ids[0]) == (None, 5, 200007)
    assert "stray_stop" in second.defects


def test_events_tell_the_message_as_it_grows(tokenizer: Tokenizer) -> None:
    parser = StreamParser(tokenizer)
    text = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>Hello world"
    events = parser.feed_all(tokens_of(tokenizer, text))
    header = Header(Role.ASSISTANT, None, "commentary", "functions.f", "<|constrain|>json")
    assert events == [header, Delta("Hello", header), Delta(" world", header)]
    assert parser.header == header
    assert parser.text == "Hello world"
    delta = events[-1]
    assert isinstance(delta, Delta)
    assert (delta.role, delta.channel, delta.recipient, delta.content_type) == (*header[:1], *header[2:5])
    (message,) = parser.feed(tokenizer.special("<|call|>"))
    assert isinstance(message, ParsedMessage)
    assert (message.stop, message.defects, message.start) == ("<|call|>", (), 0)
    assert message.message == Message(
        Role.ASSISTANT,
        "Hello world",
        channel=Channel.COMMENTARY,
        recipient="functions.f",
        content_type="<|constrain|>json",
    )
    assert parser.header is None
    assert parser.close() == []


def test_bare_text_is_streamed_from_its_first_token(tokenizer: Tokenizer) -> None:
    parser = StreamParser(tokenizer)
    assert [type(event) for event in parser.feed(tokenizer.encode("Hello")[0])] == [Header, Delta]


def test_endless_header_is_streamed_as_content(tokenizer: Tokenizer) -> None:
    parser = StreamParser(tokenizer)
    parser.feed_all([tokenizer.special("<|channel|>"), *tokenizer.encode("final" + "x" * 600)])
    assert parser.header is not None
    assert parser.header.channel == "final"


def test_half_a_character_is_held_back_and_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("🫨")
    parser = StreamParser(tokenizer)
    parser.feed_all(tokens_of(tokenizer, "<|channel|>final<|message|>a"))
    assert parser.feed(first) == []
    delta, message = parser.feed(tokenizer.special("<|return|>"))
    assert isinstance(delta, Delta)
    assert isinstance(message, ParsedMessage)
    assert (delta.text, message.text) == ("\ufffd", "a\ufffd")


def test_half_a_character_in_a_header_is_kept(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("🫨")
    for tokens in ([first], [first, *rest], [first, tokenizer.special("<|start|>")], [first, 200008], [first, 200007]):
        parser = StreamParser(tokenizer)
        parser.feed_all(tokens)
        parser.close()
        assert sum(len(message.token_ids) for message in parser.messages) == len(tokens)
    assert parse(tokenizer, "🫨").messages[0].text == "🫨"


def test_strict_parser_reports_and_reads_the_same(tokenizer: Tokenizer) -> None:
    tokens = tokens_of(tokenizer, "<|channel|>analysis<|message|>a<|channel|>final b<|return|>c")
    lenient, strict = StreamParser(tokenizer), StreamParser(tokenizer, strict=True)
    plain = lenient.feed_all(tokens) + lenient.close()
    told = strict.feed_all(tokens) + strict.close()
    reports = [event for event in told if isinstance(event, Malformed)]
    assert [event for event in told if not isinstance(event, Malformed)] == plain
    assert strict.messages == lenient.messages
    assert reports[0] == Malformed("missing_end", 4)
    assert Malformed("missing_message", 7) in reports
    assert Malformed("missing_start", 8) in reports
    assert [set(message.defects) for message in strict.messages] == [
        {"missing_end"},
        {"missing_message"},
        {"missing_start", "missing_message", "missing_role", "missing_channel"},
    ]


def test_turn_of_many_messages_is_read_in_order(tokenizer: Tokenizer) -> None:
    text = "<|channel|>analysis<|message|>a<|end|>" + "<|start|>assistant<|channel|>commentary<|message|>b<|end|>" * 5
    text += "<|start|>assistant<|channel|>final<|message|>c<|return|>"
    assert "".join(message.text for message in parse(tokenizer, text).messages) == "abbbbbc"


def test_prompt_and_completion_are_read_back(tokenizer: Tokenizer) -> None:
    prompt = [Message(Role.SYSTEM, SystemContent(effort=Effort.LOW)), Message(Role.USER, "<|end|> 你好")]
    parser = StreamParser(tokenizer, None)
    parser.feed_all(render_for_completion(prompt, tokenizer))
    parser.feed_all(tokens_of(tokenizer, "<|channel|>final<|message|>ok<|return|>"))
    assert [message.role for message in parser.messages] == [Role.SYSTEM, Role.USER, Role.ASSISTANT]
    assert parser.messages[1].text == "<|end|> 你好"


# -- fuzz -----------------------------------------------------------------------------------------

SPECIAL = ["start", "end", "message", "channel", "constrain", "return", "call", "endoftext", "reserved_200013"]
WORDS = [
    "assistant",
    "analysis",
    "commentary",
    "final",
    " to=",
    "functions",
    ".f",
    " json",
    "json",
    " code",
    "user",
    " ",
]
WORDS += [
    "\n",
    "Hello",
    " to=functions.f",
    "to",
    "=",
    "tool",
    ":",
    "<|channel|>",
    "🫨",
    "\ufffd",
    "é",
    '{"a":1}',
    "to=python",
]


def sequences(tokenizer: Tokenizer, num: int, seed: int) -> Any:
    """Random and mutated token sequences, and a role."""
    chance = random.Random(seed)
    special = [tokenizer.special(f"<|{name}|>") for name in SPECIAL]
    words = [token for word in WORDS for token in tokenizer.encode(word)]
    halves = [i for i in range(1000) if tokenizer.token_bytes(i)[0] >= 0x80]
    whole = [tokens_of(tokenizer, text) for text in READ if text]
    whole += [render_message(Message(Role.TOOL, "4", name="functions.f", recipient="assistant"), tokenizer)]

    def token() -> int:
        kind = chance.random()
        if kind < 0.4:
            return chance.choice(special)
        if kind < 0.8:
            return chance.choice(words)
        return chance.choice(halves) if kind < 0.9 else chance.randrange(-2, 201_300)

    for _ in range(num):
        if chance.random() < 0.4:
            tokens = [token() for _ in range(chance.randrange(1, 24))]
        else:
            tokens = [t for _ in range(chance.randrange(1, 3)) for t in chance.choice(whole)]
            for _ in range(chance.randrange(4)):
                at = chance.randrange(len(tokens) + 1)
                tokens[at : at + chance.randrange(2)] = [token()] * chance.randrange(3)
        yield tokens, chance.choice(["assistant", None, "user"]), chance


def test_no_sequence_of_tokens_raises_or_loses_a_token_or_depends_on_how_it_is_fed(tokenizer: Tokenizer) -> None:
    num = 0
    for tokens, role, chance in sequences(tokenizer, 20_000, seed=20):
        one = StreamParser(tokenizer, role)
        events = [event for token in tokens for event in one.feed(token)] + one.close()
        many = StreamParser(tokenizer, role)
        together = []
        left = tokens
        while left:
            k = chance.randrange(1, 6)
            together += many.feed_all(left[:k])
            left = left[k:]
        assert together + many.close() == events
        assert many.messages == one.messages
        assert [t for message in one.messages for t in message.token_ids] == tokens
        start = 0
        for message in one.messages:
            assert message.start == start
            start += len(message.token_ids)
            assert "<|" not in (message.recipient or "") and " " not in (message.recipient or "")
            assert message.role is not Role.TOOL or message.name
        said = "".join(event.text for event in events if isinstance(event, Delta))
        assert said == "".join(message.text for message in one.messages)
        assert all(event.text for event in events if isinstance(event, Delta))
        num += 1
    assert num == 20_000


def test_strict_parser_reads_every_sequence_the_same(tokenizer: Tokenizer) -> None:
    for tokens, role, _ in sequences(tokenizer, 2_000, seed=21):
        lenient, strict = StreamParser(tokenizer, role), StreamParser(tokenizer, role, strict=True)
        plain = lenient.feed_all(tokens) + lenient.close()
        told = strict.feed_all(tokens) + strict.close()
        assert [event for event in told if not isinstance(event, Malformed)] == plain
        assert all(0 <= event.position < len(tokens) for event in told if isinstance(event, Malformed))
        kinds = {event.kind for event in told if isinstance(event, Malformed)}
        assert kinds == {kind for message in strict.messages for kind in message.defects}


def test_texts_of_tokens_are_remembered_within_a_bound(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ossia.harmony.parser._MAX_WHOLE_TEXTS", 3)
    monkeypatch.setitem(vars(tokenizer), "whole_text", {})
    text = "one two three four five six one two three four five six"
    parser = parse(tokenizer, f"<|channel|>final<|message|>{text}<|return|>")
    assert parser.messages[0].text == text and len(tokenizer.whole_text) == 3


@pytest.mark.parametrize("cut", ["", "<|channel|>", "<|channel|>commentary to=functions", " to=functions.f<|channel|>"])
def test_a_header_that_was_cut_off_is_no_message(tokenizer: Tokenizer, cut: str) -> None:
    parser = StreamParser(tokenizer)
    before = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    parser.feed_all(tokens_of(tokenizer, before + cut))
    assert parser.close(cut=True) == [] and [message.text for message in parser.messages] == ["Hm."]
    # What is open beyond its header is what there is of it.
    parser = StreamParser(tokenizer)
    parser.feed_all(tokens_of(tokenizer, before + "<|channel|>final<|message|>4"))
    parser.close(cut=True)
    assert [message.text for message in parser.messages] == ["Hm.", "4"]
