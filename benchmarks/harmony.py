"""Speed of harmony/ against openai-harmony (Rust), as ratios of one run: below 1 is faster than theirs.

    python benchmarks/harmony.py [--rounds 15] [--json]

Both sides take turns (A B A B ...), so that a busy machine slows both; times are medians over the rounds.
rendering  a conversation's objects to the token ids of the prompt for the next turn. *cold* changes the text of every
           message each round, so nothing is remembered; *warm* repeats the same conversation.
parsing    tokens one at a time, taking the text of each, as a server that streams does. *bare* is their parser
           without asking for the text.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai_harmony as oh

from ossia.harmony import (
    Delta,
    DeveloperContent,
    Message,
    StreamParser,
    SystemContent,
    Tokenizer,
    ToolDescription,
    ToolNamespace,
    render_for_completion,
)
from ossia.harmony.tokenizer import _o200k_tokens

PROSE = (
    "The harbour lay still — “like a mirror”, she wrote — and nobody spoke. In 1987, 12 ships had come; now there were "
    "none. 港は静かだった。 Все молчали. 🚢\n"
)
CODE = "def area(r: float) -> float:\n    return 3.14159 * r ** 2  # in m²\n\n"
SCHEMA = {
    "type": "object",
    "properties": {
        "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
        "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
        "days": {"type": "array", "items": {"type": "object", "properties": {"date": {"type": "string"}}}},
    },
    "required": ["location"],
}
# Turns, characters in a message.
SHAPES = {"short": (1, 80), "typical": (6, 800), "long": (40, 4000)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--json", action="store_true", help="print the results as JSON")
    options = arguments.parse_args()
    results = [*bench_load()]
    tokenizer, oracle = Tokenizer.o200k_harmony(), load_oracle()
    for size, (num_turns, chars) in SHAPES.items():
        for with_tools in (False, True):
            case = f"{size}, tools" if with_tools else size
            for cold in (True, False):
                marks = [f"#{i * 7919:06d}" if cold else "#" for i in range(options.rounds)]
                conversations = (conversation(num_turns, chars, with_tools, mark) for mark in marks)
                row = bench_render(oracle, tokenizer, conversations)
                results.append({"what": f"render, {case}, {'cold' if cold else 'warm'}", **row})
            sampled = [m for m in conversation(num_turns, chars, with_tools, "#") if m.role == "assistant"]
            tokens = render_for_completion(sampled, tokenizer, drop_analysis="never")[:-2]
            row = bench_parse(oracle, tokenizer, tokens, options.rounds)
            results.append({"what": f"parse, {case}, per token", **row})
    if options.json:
        print(json.dumps(results, indent=1))
        return
    for row in results:
        numbers = [f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "what"]
        print(f"{row['what']:<36}" + "  ".join(numbers))


def bench_load() -> list[dict[str, Any]]:
    load_s, tokenizer = seconds(Tokenizer.o200k_harmony)
    first_s, _ = seconds(lambda: tokenizer.encode("a"))
    theirs_s, _ = seconds(load_oracle)
    row = {"ours_ms": load_s * 1e3, "first_encode_ms": first_s * 1e3, "theirs_ms": theirs_s * 1e3}
    return [{"what": "load", **row, "ratio": (load_s + first_s) / theirs_s}]


def load_oracle() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(_o200k_tokens()))
        Path(folder, "o200k_base.tiktoken").write_bytes(b"".join(lines))
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = folder
        return oh.load_harmony_encoding("HarmonyGptOss")


def bench_render(oracle: Any, tokenizer: Tokenizer, conversations: Any) -> dict[str, Any]:
    ours_s, theirs_s = [], []
    for messages in conversations:
        other = theirs(messages)
        a, ids = seconds(lambda m=messages: render_for_completion(m, tokenizer))
        b, expected = seconds(lambda c=other: oracle.render_conversation_for_completion(c, oh.Role.ASSISTANT))
        assert ids == expected
        ours_s.append(a)
        theirs_s.append(b)
    a, b = statistics.median(ours_s), statistics.median(theirs_s)
    return {"tokens": len(ids), "ours_us": a * 1e6, "theirs_us": b * 1e6, "ratio": a / b}


def bench_parse(oracle: Any, tokenizer: Tokenizer, tokens: list[int], rounds: int) -> dict[str, Any]:
    def ours() -> str:
        parser = StreamParser(tokenizer, None)
        said = [event.text for token in tokens for event in parser.feed(token) if type(event) is Delta]
        return "".join(said)

    def other() -> str:
        parser = oh.StreamableParser(oracle, None)
        said = []
        for token in tokens:
            parser.process(token)
            said.append(parser.last_content_delta)
        return said[-2]

    def bare() -> str:
        parser = oh.StreamableParser(oracle, None)
        for token in tokens:
            parser.process(token)
        return "".join(part.text for message in parser.messages for part in message.content)

    ours_s, theirs_s, bare_s = [], [], []
    for _ in range(rounds):
        a, said = seconds(ours)
        b, _ = seconds(other)
        c, expected = seconds(bare)
        assert said == expected
        ours_s.append(a / len(tokens))
        theirs_s.append(b / len(tokens))
        bare_s.append(c / len(tokens))
    a, b, c = (statistics.median(times) for times in (ours_s, theirs_s, bare_s))
    return {
        "tokens": len(tokens),
        "ours_us": a * 1e6,
        "theirs_us": b * 1e6,
        "ratio": a / b,
        "bare_us": c * 1e6,
        "ratio_to_bare": a / c,
    }


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def conversation(num_turns: int, chars: int, with_tools: bool, mark: str) -> list[Message]:
    """Turns of a question, reasoning, perhaps a call, and an answer, some ``chars`` each; ``mark`` makes it new."""
    functions = [ToolDescription(f"tool_{i}", f"Tool {i}. {mark}", SCHEMA) for i in range(8)]
    tools = (ToolNamespace.functions(functions),) if with_tools else ()
    builtin = (ToolNamespace.browser(), ToolNamespace.python()) if with_tools else ()
    prose = (PROSE * (chars // len(PROSE) + 1))[:chars]
    code = (CODE * (chars // len(CODE) + 1))[:chars]
    out = [
        Message("system", SystemContent(current_date="2025-06-28", tools=builtin)),
        Message("developer", DeveloperContent(f"Answer briefly. {mark}", tools)),
    ]
    for i in range(num_turns):
        out += [Message("user", f"{mark}{i} {prose}"), Message("assistant", f"{mark} {prose}", channel="analysis")]
        if with_tools:
            name = f"functions.tool_{i % 8}"
            out.append(Message("assistant", '{"location": "Oslo"}', channel="commentary", recipient=name))
            out.append(Message("tool", f"{mark} {code}", name=name, recipient="assistant", channel="commentary"))
        out.append(Message("assistant", f"{mark} {code}", channel="final"))
    return [*out, Message("user", f"{mark} {prose}")]


def theirs(messages: list[Message]) -> Any:
    """The same conversation in openai-harmony's classes."""
    out = []
    for message in messages:
        parts = [oh.TextContent(text=p) if isinstance(p, str) else their_content(p) for p in message.content]
        author = oh.Author(role=oh.Role(str(message.role)), name=message.name)
        optional = {key: getattr(message, key) for key in ("channel", "recipient", "content_type")}
        out.append(oh.Message(author=author, content=parts, **optional))
    return oh.Conversation.from_messages(out)


def their_content(content: Any) -> Any:
    tools = {
        ns.name: oh.ToolNamespaceConfig(
            name=ns.name,
            description=ns.description,
            tools=[oh.ToolDescription.new(t.name, t.description, t.parameters) for t in ns.tools],
        )
        for ns in content.tools
    }
    if isinstance(content, DeveloperContent):
        return oh.DeveloperContent(instructions=content.instructions, tools=tools)
    return oh.SystemContent(conversation_start_date=content.current_date, tools=tools)


if __name__ == "__main__":
    main()
