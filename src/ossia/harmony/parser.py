"""Token ids back to messages, one token at a time, whatever the model has sampled.

The parser never raises on a token sequence, and every token that was fed ends in exactly one message. What is well
formed is read as openai-harmony reads it; the rest is recovered by these rules:

missing_message     a header without ``<|message|>``: what can be read as a header is one, the rest is content
missing_end         ``<|start|>`` or ``<|channel|>`` inside content: the message ends there and the next begins
missing_start       tokens behind a stop: a header if they look like one, else an implicit final message
missing_role        ``<|start|>`` without a role: the assistant
missing_channel     an assistant header without a channel: channel stays None; bare text is an implicit final
repeated_channel    several channels in one header: the last known one counts
empty_channel       ``<|channel|>`` without a name
glued               words that lack the blank between them ("commentaryto=functions.f")
bare_recipient      a recipient without ``to=``
repeated_recipient  several recipients: the first counts
unexpected_words    what a header has left over when everything known has been read
special_in_header, special_in_content   a special token without meaning there: left out of the text
stray_stop          a stop where no message is open: counted to the message that follows, or to the last one

A recipient ends at the first blank or special token, so no marker can leak into a tool's name. A lone word behind
the channel is a content type ("json") unless it looks like a recipient ("browser.open"), and never a recipient on the
final channel; openai-harmony calls each such word a recipient.

Sources  openai/harmony docs/format.md and its parser; reports of malformed output from other servers.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ossia.harmony.messages import Channel, Message, Role
from ossia.harmony.tokenizer import Tokenizer

# Longer texts, or more words, are no header: they are content whose <|message|> is missing, and are streamed.
_MAX_HEADER_CHARS = 512
_MAX_HEADER_WORDS = 6
# Texts of tokens that are remembered, some ten megabytes: more than any language uses, fewer than noise does.
_MAX_WHOLE_TEXTS = 65_536

_CONSTRAIN = "<|constrain|>"
_CONTENT_TYPES = frozenset({"json", "code", "text"})
_ROLES = frozenset(map(str, Role))
_CHANNELS = frozenset(map(str, Channel))
_NAMED_TOOLS = frozenset({"python", "browser", "assistant"})


class Header(NamedTuple):
    """What stands before a message's content; as an event: a message begins."""

    role: Role
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    defects: tuple[str, ...] = ()


class Delta(NamedTuple):
    """A piece of the open message's content, never empty and never half a character."""

    text: str
    header: Header

    @property
    def role(self) -> Role:
        return self.header.role

    @property
    def channel(self) -> str | None:
        return self.header.channel

    @property
    def recipient(self) -> str | None:
        return self.header.recipient

    @property
    def content_type(self) -> str | None:
        return self.header.content_type


@dataclass(frozen=True, init=False)
class ParsedMessage(Message):
    """A finished message with the tokens it was read from, markers and header included.

    ``start`` is the index of its first token among those fed. ``stop`` is the special token that ended it, None when
    the tokens ran out or another message began. ``defects`` name what was malformed (see the module).
    """

    token_ids: tuple[int, ...] = ()
    start: int = 0
    stop: str | None = None
    defects: tuple[str, ...] = ()

    def __init__(
        self,
        header: Header,
        text: str,
        token_ids: tuple[int, ...],
        start: int,
        stop: str | None,
        defects: tuple[str, ...],
    ) -> None:
        super().__init__(
            header.role,
            text,
            channel=header.channel,
            recipient=header.recipient,
            content_type=header.content_type,
            name=header.name,
        )
        set_field = object.__setattr__
        set_field(self, "token_ids", token_ids)
        set_field(self, "start", start)
        set_field(self, "stop", stop)
        set_field(self, "defects", defects)

    @property
    def message(self) -> Message:
        """The message alone, equal to one that was never parsed."""
        return Message(
            self.role,
            self.content,
            channel=self.channel,
            recipient=self.recipient,
            content_type=self.content_type,
            name=self.name,
        )


class Malformed(NamedTuple):
    """What a strict parser reports: the kind (see the module) and the index of the token at which it was seen."""

    kind: str
    position: int


Event = Header | Delta | ParsedMessage | Malformed


class StreamParser:
    """Feed tokens, get events: a Header when a message begins, Deltas of its text, the ParsedMessage when it ends.

    With a ``role`` the tokens start behind ``<|start|>`` and that role, as a completion does behind the prompt (a
    ``<|start|>`` is accepted as well); with None they start at a ``<|start|>``. ``strict`` adds Malformed events;
    nothing else changes.
    The events of several tokens are those of each, one after the other: ``feed_all`` is a convenience.
    """

    def __init__(self, tokenizer: Tokenizer, role: Role | str | None = Role.ASSISTANT, *, strict: bool = False) -> None:
        self.messages: list[ParsedMessage] = []
        self._strict = strict
        self._start = tokenizer.special("<|start|>")
        self._message = tokenizer.special("<|message|>")
        self._channel = tokenizer.special("<|channel|>")
        self._stops = {
            tokenizer.special_tokens[name]: name
            for name in ("<|end|>", "<|return|>", "<|call|>", "<|endoftext|>")
            if name in tokenizer.special_tokens
        }
        self._special_ids = tokenizer.special_ids
        self._bytes_of = tokenizer._bytes_of
        self._whole_text = tokenizer.whole_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Of the open message. In a header: _header is None and _header_text grows; in content the other way round.
        self._tokens: list[int] = []
        self._num_before = 0
        self._position = 0
        self._header: Header | None = None
        self._header_text = ""
        self._role: Role | None = Role(role) if role is not None else None
        self._in_header = role is not None
        self._has_start = True
        self._parts: list[str] = []
        self._pending = False
        self._defects: list[str] = []

    @property
    def header(self) -> Header | None:
        """Header of the message whose content is being read, None outside of content."""
        return self._header

    @property
    def text(self) -> str:
        """Content so far of the message that is being read."""
        return "".join(self._parts)

    def feed(self, token: int) -> list[Event]:
        """Take one token; never raises, whatever the token."""
        header = self._header
        if header is not None and not self._pending:
            text = self._whole_text.get(token)
            if text is not None:
                self._tokens.append(token)
                self._parts.append(text)
                return [Delta(text, header)]
        return list(self._reported(self._feed(token)))

    def feed_all(self, tokens: Iterable[int]) -> list[Event]:
        """Take tokens in order; the events of each, joined."""
        return [event for token in tokens for event in self.feed(token)]

    def close(self, *, cut: bool = False) -> list[Event]:
        """No more tokens: the open message, if there is one, ends here.

        ``cut``: not the model has ended it. What stands of a header is then the beginning of one, and no message.
        """
        if cut and self._in_header:
            self._reset()
            return []
        return list(self._reported(self._close()))

    # -- states ------------------------------------------------------------------------------------

    def _feed(self, token: int) -> Iterator[Event]:
        self._position = self._num_before + len(self._tokens)
        if self._header is not None:
            yield from self._feed_content(token)
        elif self._in_header:
            yield from self._feed_header(token)
        else:
            yield from self._feed_between(token)

    def _feed_between(self, token: int) -> Iterator[Event]:
        if token in self._stops:
            self._tokens.append(token)
            yield from self._defect("stray_stop")
        elif token == self._start:
            self._open_header(None)
            self._tokens.append(token)
        else:
            self._open_header(None)
            self._has_start = False
            yield from self._defect("missing_start")
            yield from self._feed_header(token)

    def _feed_header(self, token: int) -> Iterator[Event]:
        if token == self._start:
            if self._header_text or self._pending:
                yield from self._recover_header()
                yield from self._finish(None)
            elif self._tokens:
                yield from self._defect("special_in_header")
            self._open_header(None)
            self._tokens.append(token)
            return
        self._tokens.append(token)
        if token == self._message:
            self._header_text += self._flush()
            header = parse_header(self._header_text, self._role)
            yield from self._open_content(header)
        elif token in self._stops:
            yield from self._recover_header()
            yield from self._finish(self._stops[token])
        else:
            if token in self._special_ids:
                self._header_text += self._flush() + self._bytes_of[token].decode()
            else:
                self._header_text += self._decode(token)
            if not _may_be_header(self._header_text, self._role is None and self._has_start):
                yield from self._recover_header()

    def _feed_content(self, token: int) -> Iterator[Event]:
        assert self._header is not None
        if token in self._stops:
            self._tokens.append(token)
            yield from self._finish(self._stops[token])
        elif token == self._start or token == self._channel:
            yield from self._defect("missing_end")
            yield from self._finish(None)
            self._open_header(None if token == self._start else Role.ASSISTANT)
            if token == self._start:
                self._tokens.append(token)
            else:
                yield from self._feed_header(token)
        elif token in self._special_ids:
            self._tokens.append(token)
            yield from self._content(self._flush())
            yield from self._defect("special_in_content")
        else:
            self._tokens.append(token)
            yield from self._content(self._decode(token))

    def _close(self) -> Iterator[Event]:
        self._position = max(self._num_before + len(self._tokens) - 1, 0)
        if self._header is not None:
            yield from self._finish(None)
        elif self._in_header and self._tokens:
            yield from self._recover_header()
            yield from self._finish(None)
        elif self._tokens and self.messages:
            last = self.messages[-1]
            self.messages[-1] = _with_strays(last, tuple(self._tokens))
            self._reset()
        elif self._tokens:
            self._header = Header(Role.ASSISTANT)
            yield from self._finish(None)

    # -- steps -------------------------------------------------------------------------------------

    def _open_header(self, role: Role | None) -> None:
        self._in_header = True
        self._has_start = True
        self._role = role
        self._header_text = ""

    def _open_content(self, header: Header) -> Iterator[Event]:
        for kind in header.defects:
            yield from self._defect(kind)
        self._header = header
        self._in_header = False
        yield header

    def _recover_header(self) -> Iterator[Event]:
        """Read a header that never reached ``<|message|>``; what is left of it is content."""
        yield from self._defect("missing_message")
        header, text = recover_header(self._header_text, self._role)
        yield from self._open_content(header)
        yield from self._content(text)

    def _content(self, text: str) -> Iterator[Event]:
        if text:
            assert self._header is not None
            self._parts.append(text)
            yield Delta(text, self._header)

    def _finish(self, stop: str | None) -> Iterator[Event]:
        yield from self._content(self._flush())
        assert self._header is not None
        message = ParsedMessage(
            self._header,
            "".join(self._parts),
            tuple(self._tokens),
            self._num_before,
            stop,
            tuple(dict.fromkeys(self._defects)),
        )
        self.messages.append(message)
        self._reset()
        yield message

    def _reset(self) -> None:
        self._num_before += len(self._tokens)
        self._tokens = []
        self._header = None
        self._header_text = ""
        self._in_header = False
        self._parts = []
        self._defects = []

    def _decode(self, token: int) -> str:
        """Text of an ordinary token, without the bytes of an unfinished character."""
        data = self._bytes_of[token]
        if not self._pending:
            try:
                text = data.decode()
            except UnicodeDecodeError:
                pass
            else:
                if token in self._bytes_of and len(self._whole_text) < _MAX_WHOLE_TEXTS:
                    self._whole_text[token] = text
                return text
        text = self._utf8.decode(data)
        self._pending = bool(self._utf8.getstate()[0])
        return text

    def _flush(self) -> str:
        if not self._pending:
            return ""
        self._pending = False
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

    def _defect(self, kind: str) -> Iterator[Event]:
        self._defects.append(kind)
        yield Malformed(kind, self._position)

    def _reported(self, events: Iterator[Event]) -> Iterator[Event]:
        if self._strict:
            return events
        return (event for event in events if type(event) is not Malformed)


def _with_strays(message: ParsedMessage, strays: tuple[int, ...]) -> ParsedMessage:
    header = Header(message.role, message.name, message.channel, message.recipient, message.content_type)
    defects = tuple(dict.fromkeys((*message.defects, "stray_stop")))
    return ParsedMessage(header, message.text, message.token_ids + strays, message.start, message.stop, defects)


# -- headers ---------------------------------------------------------------------------------------

_MARKER = re.compile(r"<\|([a-z0-9_]+)\|>")
_WORD = re.compile(r"[^ \t\n\x0b\x0c\r]+")
_GLUED_CHANNEL = re.compile(r"(analysis|commentary|final)(to=.*)")
_GLUED_ROLE = re.compile(r"(system|developer|user|assistant|tool)(to=.*|analysis|commentary|final)")


@lru_cache(maxsize=1024)
def parse_header(text: str, role: Role | None) -> Header:
    """Read what stands between ``<|start|>`` (and ``role``, if it is known) and ``<|message|>``."""
    defects: list[str] = []
    before, *marked = _MARKER.split(text)
    words = _WORD.findall(before)
    name = None
    if role is None:
        role, name, words = _read_role(words, len(marked) > 0, defects)
    else:
        # A tool that is not named is known as one.
        name = role if role is Role.TOOL else None
        words = words[1:] if words and words[0] == role else words
    channels: list[str] = []
    channel_name: str | None
    content_type: str | None = None
    for marker, segment in zip(marked[::2], marked[1::2], strict=True):
        behind = _WORD.findall(segment)
        if marker == "channel":
            channel, behind = _read_channel(behind, defects)
            channels += channel
        elif marker == "constrain" and content_type is None:
            content_type = _CONSTRAIN + (behind.pop(0) if behind else "")
        else:
            defects.append("special_in_header")
        words += behind
    if channels:
        channel_name, unused = _choose_channel(channels, defects)
        words += unused
    else:
        # "commentary to=functions.f" without the marker in front.
        named = [w for w in words if w in _CHANNELS]
        channel_name = named[0] if named and role is Role.ASSISTANT else None
        if channel_name is not None:
            words.remove(channel_name)
        if role is Role.ASSISTANT:
            defects.append("missing_channel")
    recipient, words = _read_recipient(words, defects)
    if recipient is not None and channel_name in _CONTENT_TYPES and content_type is None:
        channel_name, content_type = None, channel_name  # "to=functions.f<|channel|>json"
        defects.append("missing_channel")
    if recipient is None and channel_name != Channel.FINAL:
        recipient = _bare_recipient(words, content_type, defects)
    if words and content_type is None:
        content_type = words.pop(0)
    if words:
        defects.append("unexpected_words")
    return Header(role, name, channel_name, recipient, content_type, tuple(defects))


def _read_role(words: list[str], has_marker: bool, defects: list[str]) -> tuple[Role, str | None, list[str]]:
    if not words:
        defects.append("missing_role")
        return Role.ASSISTANT, None, words
    first, *rest = words
    if first == Role.TOOL:
        return Role.TOOL, first, rest
    if first in _ROLES:
        return Role(first), None, rest
    author, _, name = first.partition(":")
    if name and author in _ROLES:
        return Role(author), name, rest
    if glued := _GLUED_ROLE.fullmatch(first):
        defects.append("glued")
        role = Role(glued[1])
        return role, role if role is Role.TOOL else None, [glued[2], *rest]
    if first in _CHANNELS or first.startswith("to="):
        defects.append("missing_role")
        return Role.ASSISTANT, None, words
    if not rest and not has_marker:
        defects.append("unexpected_words")  # A tool's message says to whom it goes.
    return Role.TOOL, first, rest


def _read_channel(behind: list[str], defects: list[str]) -> tuple[list[str], list[str]]:
    """The word that names the channel, and the words behind it."""
    if not behind or behind[0].startswith("to="):
        defects.append("empty_channel")
        return [], behind
    first, *rest = behind
    if glued := _GLUED_CHANNEL.fullmatch(first):
        defects.append("glued")
        return [glued[1]], [glued[2], *rest]
    return [first], rest


def _choose_channel(channels: list[str], defects: list[str]) -> tuple[str, list[str]]:
    known = [c for c in channels if c in _CHANNELS]
    chosen = known[-1] if known else channels[0]
    if len(channels) > 1:
        defects.append("repeated_channel")
    unused = channels.copy()
    unused.remove(chosen)
    return chosen, [c for c in unused if c not in _CHANNELS]


def _read_recipient(words: list[str], defects: list[str]) -> tuple[str | None, list[str]]:
    """The first ``to=NAME``, and the words without any."""
    recipient: str | None = None
    others: list[str] = []
    awaited = False
    for word in words:
        value = word if awaited else word.removeprefix("to=")
        if not awaited and not word.startswith("to="):
            others.append(word)
        elif not value:
            awaited = True  # "to= functions.f"
            defects.append("glued")
        else:
            awaited = False
            if recipient is None:
                recipient = value
            elif value != recipient:
                defects.append("repeated_recipient")
    return recipient, others


def _bare_recipient(words: list[str], content_type: str | None, defects: list[str]) -> str | None:
    """Take a recipient that stands without ``to=`` out of ``words``."""
    if not words:
        return None
    if content_type is None and len(words) == 1 and not ("." in words[0] or words[0] in _NAMED_TOOLS):
        return None
    defects.append("bare_recipient")
    return words.pop(0)


# -- headers without an end ------------------------------------------------------------------------

_OPENINGS = ("assistant", "to=", *Channel)
_ROLE_WORD = re.compile(r"\s*(?:system|developer|user|assistant|tool)(?:(?=analysis|commentary|final|to=)|(?![\w:'-]))")
_TOOL_NAME = re.compile(r"\s*[\w.:-]+(?=\s+to=|\s*<\|channel\|>)")
_BARE_CHANNEL = re.compile(r"\s*(?:analysis|commentary|final)(?=\s*to=|<\||\s*$)")
_HEADER_PART = re.compile(
    r"\s*to=\s?[^\s<{(\"']+"
    r"|\s*<\|channel\|>\s*(?:analysis|commentary|final|(?!to=)[^\s<{(\"']*)"
    r"|\s*<\|constrain\|>\s*\w*"
    r"|\s*<\|[a-z0-9_]+\|>"
)
_TYPE_WORD = re.compile(r"\s+(?:json|code|text)(?!\w)")


@lru_cache(maxsize=4096)
def _may_be_header(text: str, any_author: bool) -> bool:
    """Whether ``text`` can still become a header. Behind ``<|start|>`` any word may be the author."""
    stripped = text.strip()
    if len(text) > _MAX_HEADER_CHARS or "\n" in stripped:
        return False
    before, *marked = _MARKER.split(text)
    if sum(len(_WORD.findall(part)) for part in (before, *marked[1::2])) > _MAX_HEADER_WORDS:
        return False
    words = _WORD.findall(before)
    if any_author or not words:
        return True
    first = words[0]
    if len(words) == 1 and not marked and not before[-1].isspace():
        return any(opening.startswith(first) or first.startswith(opening) for opening in _OPENINGS)
    return first.startswith("to=") or first in _OPENINGS or _GLUED_ROLE.fullmatch(first) is not None


def recover_header(text: str, role: Role | None) -> tuple[Header, str]:
    """Split a text that lacks ``<|message|>`` into the header it begins with and content."""
    end = 0
    if (match := _ROLE_WORD.match(text)) or (role is None and (match := _TOOL_NAME.match(text))):
        end = match.end()
    if match := _BARE_CHANNEL.match(text, end):
        end = match.end()
    while match := _HEADER_PART.match(text, end) or ("to=" in text[:end] and _TYPE_WORD.match(text, end)) or None:
        end = match.end()
    header = parse_header(text[:end], role)
    if header.role is Role.ASSISTANT and header.channel is None and header.recipient is None:
        header = header._replace(channel=str(Channel.FINAL))
    content = text[end:]
    return header, content.removeprefix(" ") if end else content
