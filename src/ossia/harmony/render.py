"""Messages to token ids: for sampling, for storing, for training.

A message is ``<|start|>{role}{ to=recipient}<|channel|>{channel} {content type}<|message|>{content}<|end|>``; an
assistant message that has a recipient is a call and ends in ``<|call|>``. Only the bracketed markers are special
tokens; everything else, headers included, is encoded as ordinary text, so no name or text can forge a message.
Pieces are encoded one by one (role, recipient, channel, content parts), as the model has seen them.

Source   openai/harmony docs/format.md and its renderer, compared token for token in tests/harmony/.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from ossia.harmony.messages import (
    Channel,
    Content,
    Conversation,
    DeveloperContent,
    Message,
    ResponseFormat,
    Role,
    SystemContent,
    ToolNamespace,
)
from ossia.harmony.tokenizer import Tokenizer
from ossia.harmony.typescript import compact_json, typescript

DropAnalysis = Literal["harmony", "past_turns", "never"]
"""Which chain of thought a prompt leaves out.

harmony      if the last assistant message is final, the analysis before the *first* final message (openai-harmony's
             rule; right for a caller that renders after every turn and keeps what was rendered)
past_turns   all analysis before the *last* final message (the rule of the format's text; right for a caller that
             stores every message and renders the whole history anew)
never        none
"""

_CONSTRAIN = "<|constrain|>"


def render(
    conversation: Conversation | Sequence[Message],
    tokenizer: Tokenizer,
    *,
    drop_analysis: DropAnalysis = "harmony",
) -> list[int]:
    """Token ids of the messages as they stand, each closed by ``<|end|>`` or ``<|call|>``."""
    renderer = _renderer(tokenizer)
    has_functions = has_function_tools(conversation)
    out: list[int] = []
    messages = _messages(conversation)
    for i in kept_indices(messages, drop_analysis):
        renderer.render_into(messages[i], out, has_functions)
    return out


def render_for_completion(
    conversation: Conversation | Sequence[Message],
    tokenizer: Tokenizer,
    *,
    role: Role = Role.ASSISTANT,
    drop_analysis: DropAnalysis = "harmony",
) -> list[int]:
    """The prompt for the next turn: ``render`` and then ``<|start|>assistant``."""
    out = render(conversation, tokenizer, drop_analysis=drop_analysis)
    out += _renderer(tokenizer).opening(role)
    return out


def render_message(message: Message, tokenizer: Tokenizer, *, has_functions: bool = False) -> list[int]:
    """One message alone, as an agent loop appends a tool's result. ``has_functions`` matters to system messages."""
    out: list[int] = []
    _renderer(tokenizer).render_into(message, out, has_functions)
    return out


@dataclass(frozen=True)
class TokenSpan:
    """Tokens ``start`` to ``end`` (exclusive) of one message, all sampled by the assistant or none."""

    start: int
    end: int
    role: Role
    channel: str | None
    recipient: str | None
    sampled: bool


class TrainingTokens(NamedTuple):
    """Token ids and the spans that cover them in order, without a gap."""

    token_ids: list[int]
    spans: list[TokenSpan]

    def sampled_mask(self) -> list[bool]:
        """For each token, whether the assistant sampled it: where a loss is to be taken."""
        return [span.sampled for span in self.spans for _ in range(span.start, span.end)]


def render_for_training(
    conversation: Conversation | Sequence[Message],
    tokenizer: Tokenizer,
    *,
    drop_analysis: DropAnalysis = "harmony",
) -> TrainingTokens:
    """Like ``render``, with ``<|return|>`` at the end of a closing final message, and with a span for each token.

    Sampled is what the model itself would have produced at that place: of an assistant message everything behind
    ``<|start|>assistant``, and that too where the assistant goes on after its own ``<|end|>``. The ``<|end|>`` of a
    final message inside the conversation is not: the model sampled ``<|return|>`` there, and history spells it so.
    """
    renderer = _renderer(tokenizer)
    has_functions = has_function_tools(conversation)
    messages = _messages(conversation)
    kept = [messages[i] for i in kept_indices(messages, drop_analysis)]
    out: list[int] = []
    lengths: list[int] = []
    for message in kept:
        begin = len(out)
        renderer.render_into(message, out, has_functions)
        lengths.append(len(out) - begin)
    if kept and _is_answer(kept[-1]):
        out[-1] = renderer.return_id
    return TrainingTokens(out, training_spans(kept, lengths, tokenizer))


def training_spans(messages: Sequence[Message], lengths: Sequence[int], tokenizer: Tokenizer) -> list[TokenSpan]:
    """The spans of `render_for_training` for messages that are rendered one by one, to ``lengths`` tokens each."""
    renderer = _renderer(tokenizer)
    spans: list[TokenSpan] = []
    begin = 0
    goes_on = False
    for i, (message, length) in enumerate(zip(messages, lengths, strict=True)):
        end = begin + length
        by_assistant = message.role is Role.ASSISTANT
        is_last = i == len(messages) - 1
        # Others end in <|call|>, or in <|return|>.
        ends_in_end = message.recipient is None and not (is_last and _is_answer(message))
        turn_ends = is_last or messages[i + 1].role is not Role.ASSISTANT
        respelled = ends_in_end and _is_answer(message) and turn_ends
        given = begin if goes_on else begin + len(renderer.opening(message.role))
        last = end - 1 if respelled else end
        edges = [(begin, given, False), (given, last, True), (last, end, False)]
        for start, stop, sampled in edges if by_assistant else [(begin, end, False)]:
            if start < stop:
                spans.append(TokenSpan(start, stop, message.role, message.channel, message.recipient, sampled))
        goes_on = by_assistant and ends_in_end
        begin = end
    return spans


def _is_answer(message: Message) -> bool:
    return message.role is Role.ASSISTANT and message.channel == Channel.FINAL


# -- which messages --------------------------------------------------------------------------------


def has_function_tools(messages: Iterable[Message]) -> bool:
    """Whether a developer message declares functions, of which the system message then speaks."""
    return any(
        namespace.name == "functions" and namespace.tools
        for message in messages
        if message.role is Role.DEVELOPER
        for part in message.content
        if isinstance(part, DeveloperContent)
        for namespace in part.tools
    )


def kept_indices(messages: Sequence[Message], drop_analysis: DropAnalysis = "harmony") -> list[int]:
    """Which of the messages a prompt holds, by index, under a rule for the chain of thought."""
    finals = [i for i, message in enumerate(messages) if message.channel == Channel.FINAL]
    if not finals or drop_analysis == "never":
        return list(range(len(messages)))
    if drop_analysis == "past_turns":
        boundary = finals[-1]
    else:
        last = next((m for m in reversed(messages) if m.role is Role.ASSISTANT), None)
        boundary = finals[0] if last is not None and last.channel == Channel.FINAL else 0
    return [i for i, m in enumerate(messages) if i >= boundary or m.channel != Channel.ANALYSIS]


def _messages(conversation: Conversation | Sequence[Message]) -> Sequence[Message]:
    return conversation.messages if isinstance(conversation, Conversation) else conversation


# -- one message -----------------------------------------------------------------------------------


class Memo:
    """Token ids of the texts that were asked for last, of at most ``max_chars`` together. For any thread."""

    def __init__(self, encode: Callable[[str], list[int]], max_chars: int = 4_000_000) -> None:
        self._encode = encode
        self._max_chars = max_chars
        self._lock = threading.Lock()
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self.num_chars = 0

    def __call__(self, text: str) -> array[int]:
        with self._lock:
            known = self._known.get(text)
            if known is not None:
                self._known.move_to_end(text)
                return known
        # Packed: as a tuple of numbers they would take ten times the room.
        made = array("I", self._encode(text))
        with self._lock:
            if text not in self._known:
                self._known[text] = made
                self.num_chars += len(text)
            while self.num_chars > self._max_chars:
                self.num_chars -= len(self._known.popitem(last=False)[0])
        return made


@lru_cache(maxsize=8)
def _renderer(tokenizer: Tokenizer) -> _Renderer:
    return _Renderer(tokenizer)


class _Renderer:
    """The special ids of one tokenizer, and memos of what recurs: headers, and system and developer texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self._start = tokenizer.special("<|start|>")
        self._message = tokenizer.special("<|message|>")
        self._channel = tokenizer.special("<|channel|>")
        self._constrain = tokenizer.special(_CONSTRAIN)
        self._call = tokenizer.special("<|call|>")
        self.end_id = tokenizer.special("<|end|>")
        self.return_id = tokenizer.special("<|return|>")
        self._header = lru_cache(maxsize=4096)(self._encode_header)
        # Prompts of one service share these texts.
        self._boilerplate = Memo(self._encode)

    def opening(self, role: Role) -> list[int]:
        """``<|start|>assistant``: what the prompt gives, and the model goes on from."""
        return [self._start, *self._boilerplate(str(role))]

    def render_into(self, message: Message, out: list[int], has_functions: bool) -> None:
        out += self._header(message.role, message.name, message.recipient, message.channel, message.content_type)
        for part in message.content:
            if isinstance(part, str):
                out += self._encode(part)
            else:
                out += self._boilerplate(_content_text(part, has_functions))
        is_call = message.role is Role.ASSISTANT and message.recipient is not None
        out.append(self._call if is_call else self.end_id)

    def _encode_header(
        self,
        role: Role,
        name: str | None,
        recipient: str | None,
        channel: str | None,
        content_type: str | None,
    ) -> tuple[int, ...]:
        out = [self._start]
        if role is Role.TOOL:
            out += self._encode(name or "tool")  # A tool is known by its name alone.
        else:
            out += self._encode(str(role))
            if name is not None:
                out += self._encode(f":{name}")
        if recipient is not None and recipient != "all":
            out += self._encode(f" to={recipient}")
        if channel is not None:
            out.append(self._channel)
            out += self._encode(str(channel))
        if content_type is not None:
            if content_type.startswith(_CONSTRAIN):
                out += self._encode(" ")
                out.append(self._constrain)
                out += self._encode(content_type.removeprefix(_CONSTRAIN))
            else:
                out += self._encode(f" {content_type}")
        out.append(self._message)
        return tuple(out)


# -- texts of system and developer messages --------------------------------------------------------


def _content_text(content: Content, has_functions: bool) -> str:
    if isinstance(content, SystemContent):
        return system_text(content, has_functions)
    assert isinstance(content, DeveloperContent)
    return developer_text(content)


def system_text(content: SystemContent, has_functions: bool) -> str:
    """Text of a system message; ``has_functions`` is whether a developer message declares functions."""
    top = [content.model_identity] if content.model_identity is not None else []
    if content.knowledge_cutoff is not None:
        top.append(f"Knowledge cutoff: {content.knowledge_cutoff}")
    if content.current_date is not None:
        top.append(f"Current date: {content.current_date}")
    sections = ["\n".join(top)] if top else []
    if content.effort is not None:
        sections.append(f"Reasoning: {content.effort}")
    if content.tools:
        sections.append(_tools_section(content.tools))
    if content.channels:
        channels = f"# Valid channels: {', '.join(content.channels)}."
        if content.channel_required:
            channels += " Channel must be included for every message."
        if has_functions:
            channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
        sections.append(channels)
    return "\n\n".join(sections)


def developer_text(content: DeveloperContent) -> str:
    """Text of a developer message."""
    sections = []
    if content.instructions is not None:
        sections += ["# Instructions", content.instructions]
    if content.tools:
        sections.append(_tools_section(content.tools))
    if content.response_formats:
        sections.append("# Response Formats")
        sections += [_response_format(f) for f in content.response_formats]
    return "\n\n".join(sections)


def _tools_section(namespaces: Sequence[ToolNamespace]) -> str:
    in_order = sorted(namespaces, key=lambda namespace: namespace.name)
    return "\n\n".join(["# Tools", *map(_namespace, in_order)])


def _namespace(namespace: ToolNamespace) -> str:
    described = _lines(namespace.description or "")
    if not namespace.tools:
        return "\n".join([f"## {namespace.name}\n", *described])
    out = [
        f"## {namespace.name}\n",
        *(f"// {line}" for line in described),
        f"namespace {namespace.name} {{\n",
    ]
    for tool in namespace.tools:
        out += [f"// {line}" for line in _lines(tool.description)]
        argument = "" if tool.parameters is None else f"_: {typescript(tool.parameters)}"
        out.append(f"type {tool.name} = ({argument}) => any;\n")
    out.append(f"}} // namespace {namespace.name}")
    return "\n".join(out)


def _response_format(response_format: ResponseFormat) -> str:
    comments = [f"// {line}" for line in _lines(response_format.description or "")]
    return "\n".join([f"## {response_format.name}\n", *comments, compact_json(response_format.schema)])


def _lines(text: str) -> list[str]:
    """Lines that end in LF or CR LF; other line breaks of Unicode belong to the text."""
    *lines, rest = text.split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    return [*lines, rest] if rest else lines
