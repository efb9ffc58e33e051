"""`ossia tokenize`, `ossia render`, `ossia parse`: what exactly a model sees and says, for people debugging prompts."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ossia.errors import InputError, NotFoundError

if TYPE_CHECKING:
    from ossia.harmony import Tokenizer

Model = Annotated[
    str, typer.Option("--model", "-m", help="Take the vocabulary of this checkpoint instead of o200k_harmony.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def tokenize(
    text: Annotated[str, typer.Argument(help="Text, or `-` to read standard input.")] = "-",
    specials: Annotated[
        bool, typer.Option("--specials", help="Read <|start|> and the like as special tokens, not as text.")
    ] = False,
    model: Model = "",
    as_json: AsJson = False,
) -> None:
    """Show the tokens of a text, as the model gets them.

    Text from people never becomes a special token; `--specials` is for text that is a rendered prompt.
    """
    tokenizer = load_tokenizer(model)
    text = argument_or_stdin(text)
    token_ids = encode_with_specials(tokenizer, text) if specials else tokenizer.encode(text)
    if as_json:
        print(json.dumps({"token_ids": token_ids, "tokens": [_shown(tokenizer, i) for i in token_ids]}))
        return
    _print_tokens(tokenizer, token_ids)


def render(
    file: Annotated[Path, typer.Argument(help="A conversation as JSON, or `-` to read standard input.")],
    completion: Annotated[
        bool, typer.Option("--completion/--whole", help="End with the opening of the assistant's next turn, or not.")
    ] = True,
    tokens: Annotated[bool, typer.Option("--tokens", help="One token a line, with its id.")] = False,
    model: Model = "",
    as_json: AsJson = False,
) -> None:
    """Show a conversation in the harmony format, as the model gets it.

    The file holds {"messages": [{"role": "user", "content": "Hello"}, ...]}; roles are system, developer, user,
    assistant and tool.
    """
    from ossia import harmony

    tokenizer = load_tokenizer(model)
    conversation = harmony.Conversation.from_json(read_text(file))
    to_ids = harmony.render_for_completion if completion else harmony.render
    token_ids = to_ids(conversation, tokenizer)
    if as_json:
        print(json.dumps({"token_ids": token_ids, "text": tokenizer.decode(token_ids)}))
    elif tokens:
        _print_tokens(tokenizer, token_ids)
    else:
        print(printable(tokenizer.decode(token_ids), sys.stdout.isatty()))


def parse(
    text: Annotated[
        str, typer.Argument(help="What a model said, with its special tokens, or token ids; `-` reads standard input.")
    ] = "-",
    model: Model = "",
    as_json: AsJson = False,
) -> None:
    """Show the messages in a model's output, and what is malformed in it.

    The output is text with special tokens (`<|channel|>final<|message|>Hi<|return|>`) or a list of token ids
    (`[200005, 17196, ...]`). Exit code 1 means that something was malformed.
    """
    from ossia.harmony import Malformed, StreamParser

    tokenizer = load_tokenizer(model)
    text = argument_or_stdin(text)
    token_ids = _as_token_ids(text)
    if token_ids is None:
        token_ids = encode_with_specials(tokenizer, text)
    begins_with_start = token_ids[:1] == [tokenizer.special("<|start|>")]
    parser = StreamParser(tokenizer, role=None if begins_with_start else "assistant", strict=True)
    events = [*parser.feed_all(token_ids), *parser.close()]
    faults = [f"{event.kind} at token {event.position}" for event in events if isinstance(event, Malformed)]
    if as_json:
        messages = [message.to_dict() for message in parser.messages]
        print(json.dumps({"messages": messages, "malformed": faults}))
        raise typer.Exit(int(bool(faults)))
    for message in parser.messages:
        header = [str(message.role)]
        header += [
            f"{key}={value}"
            for key in ("name", "channel", "recipient", "content_type")
            if (value := getattr(message, key))
        ]
        lines = [" ".join(header), *(f"    {line}" for line in message.text.splitlines() or ["(empty)"]), ""]
        print(printable("\n".join(lines), sys.stdout.isatty()))
    for fault in faults:
        print(f"malformed: {fault}", file=sys.stderr)
    raise typer.Exit(int(bool(faults)))


def printable(text: str, is_terminal: bool) -> str:
    """Text that cannot steer a terminal: control characters, but for tab and newline, become visible signs."""
    return text.translate(_CONTROL_SIGNS) if is_terminal else text


# C0 has pictures of its own from U+2400 on; C1 and delete have none or few.
_CONTROL_SIGNS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | dict.fromkeys(
    range(0x7F, 0xA0), 0xFFFD
)


def load_tokenizer(model: str) -> Tokenizer:
    """The vocabulary of a named checkpoint, or gpt-oss's own when none is named."""
    from ossia.harmony import Tokenizer

    if not model:
        return Tokenizer.o200k_harmony()
    from ossia.model.hub import resolve_model
    from ossia.model.weights import Checkpoint

    path = resolve_model(model)
    if path.suffix == ".json" or (path / "tokenizer.json").is_file():
        # A vocabulary may stand alone.
        return Tokenizer.from_file(path)
    return Checkpoint.open_unchecked(path).tokenizer()


def encode_with_specials(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a rendered prompt: names of special tokens become those tokens, the rest is ordinary text."""
    pattern = "|".join(re.escape(name) for name in sorted(tokenizer.special_tokens, key=len, reverse=True))
    token_ids: list[int] = []
    for piece in re.split(f"({pattern})", text):
        special = tokenizer.special_tokens.get(piece)
        token_ids += tokenizer.encode(piece) if special is None else [special]
    return token_ids


def _as_token_ids(text: str) -> list[int] | None:
    """The numbers of a JSON list, None when the text is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    return value if is_list else None


def argument_or_stdin(text: str) -> str:
    """An argument, or for `-` what stands in standard input, without the newline that ends it."""
    return _read_stdin().removesuffix("\n") if text == "-" else text


def _read_stdin() -> str:
    if sys.stdin is None:
        raise InputError("standard input is closed; give a text or a file instead of `-`")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text: {error}") from None


def read_text(file: Path) -> str:
    """A file's text, or for `-` that of standard input. Raises NotFoundError, InputError."""
    if str(file) == "-":
        return _read_stdin()
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text: {error}") from None


def _print_tokens(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    for token_id in token_ids:
        print(f"{token_id:>8}  {_shown(tokenizer, token_id)!r}")


def _shown(tokenizer: Tokenizer, token_id: int) -> str:
    # Half a character has no text of its own; its bytes are shown instead.
    return tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace")
