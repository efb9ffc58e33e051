"""The harmony chat format: messages, rendering to token ids, parsing back.

    tokenizer = Tokenizer.o200k_harmony()
    prompt = render_for_completion([Message(Role.SYSTEM, SystemContent()), Message(Role.USER, "Hi")], tokenizer)

Text goes in and out as text, tokens as ids; nothing here knows HTTP, models or tools.
"""

from ossia.harmony.messages import (
    Channel,
    Content,
    Conversation,
    DeveloperContent,
    Effort,
    Message,
    ResponseFormat,
    Role,
    SystemContent,
    ToolDescription,
    ToolNamespace,
    tool_message,
)
from ossia.harmony.parser import Delta, Event, Header, Malformed, ParsedMessage, StreamParser
from ossia.harmony.render import (
    DropAnalysis,
    TokenSpan,
    TrainingTokens,
    render,
    render_for_completion,
    render_for_training,
    render_message,
)
from ossia.harmony.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "Channel",
    "Content",
    "Conversation",
    "Delta",
    "DeveloperContent",
    "DropAnalysis",
    "Effort",
    "Event",
    "Header",
    "Malformed",
    "Message",
    "ParsedMessage",
    "ResponseFormat",
    "Role",
    "StreamDecoder",
    "StreamParser",
    "SystemContent",
    "TokenSpan",
    "Tokenizer",
    "ToolDescription",
    "ToolNamespace",
    "TrainingTokens",
    "render",
    "render_for_completion",
    "render_for_training",
    "render_message",
    "tool_message",
]
