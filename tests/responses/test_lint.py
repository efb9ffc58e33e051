"""Thousands of generated turns, good and broken: every stream is well formed, every token counted, nothing raised."""

from __future__ import annotations

import asyncio
import random

import pytest
from tests.responses.lint import lint
from tests.responses.scripts import TOKENIZER, Scripted, model, tokens

from ossia.harmony import StreamParser
from ossia.responses.include import shown
from ossia.responses.loop import Run
from ossia.responses.schema import ResponseRequest
from ossia.responses.seal import Seal

TOOLS = [
    {"type": "function", "name": "add", "parameters": {"type": "object"}},
    {"type": "custom", "name": "patch"},
    {"type": "namespace", "name": "crm", "description": "", "tools": [{"type": "function", "name": "find"}]},
]
PIECES = [
    "<|channel|>analysis<|message|>", "<|channel|>final<|message|>", "<|channel|>commentary<|message|>",
    "<|channel|>commentary to=functions.add <|constrain|>json<|message|>", " to=crm.find<|channel|>commentary json",
    "<|channel|>commentary to=functions.patch<|message|>", "<|channel|>analysis to=python code<|message|>",
    "<|end|>", "<|end|><|start|>assistant", "<|return|>", "<|call|>", "<|start|>", "<|message|>", "<|channel|>",
    "<|constrain|>", "user", " to=", "functions.add", "{}", "Hello", " world", "🎼 é", "\n", "json", "<|endoftext|>",
]  # fmt: skip


def generated(seed: int) -> list[int]:
    """A turn that is mostly well formed: pieces in random order, now and then a token of an odd kind."""
    draw = random.Random(seed)
    script: list[int] = []
    for _ in range(draw.randint(1, 14)):
        script += tokens(draw.choice(PIECES))
        if draw.random() < 0.1:
            script.append(draw.randrange(TOKENIZER.vocab_size))
    stops = {TOKENIZER.special("<|return|>"), TOKENIZER.special("<|call|>")}
    end = next((i for i, token in enumerate(script) if token in stops), len(script) - 1)
    return script[: end + 1]


async def check(seed: int) -> None:
    made = model(engine=Scripted(generated(seed), tokens("<|channel|>final<|message|>Done.<|return|>")))
    limit = random.Random(-seed).choice([None, None, 1, 5, 20])
    run = Run(ResponseRequest(input="Hi", tools=TOOLS, max_output_tokens=limit), made)
    response = lint([event.to_dict() async for event in run.events()])
    assert response["status"] in ("completed", "incomplete")
    assert response["output"] == [shown(entry.item, ()) for entry in run.output]
    thoughts = [entry.item["usage"] for entry in run.output if entry.item["type"] == "reasoning"]
    used = response["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert sum(one["reasoning_tokens"] for one in thoughts) == used
    if limit is not None:
        assert response["usage"]["output_tokens"] <= limit
    assert made.engine.num_open == 0
    # What was said is what a parser reads.
    parser = StreamParser(TOKENIZER)
    parser.feed_all(made.engine.scripts[0])
    parser.close()


def _check_all(seeds: range) -> None:
    async def all_of_them() -> None:
        for seed in seeds:
            await check(seed)

    asyncio.run(all_of_them())


def test_every_generated_turn_makes_a_well_formed_stream():
    _check_all(range(1_000))


@pytest.mark.slow
def test_every_one_of_many_generated_turns_makes_a_well_formed_stream():
    _check_all(range(1_000, 10_000))


def test_what_was_sealed_opens_under_its_key_alone_and_unchanged():
    seal = Seal.ephemeral()
    text = seal.seal("Gedanken 🎼".encode())
    assert seal.open(text) == "Gedanken 🎼".encode()
    assert Seal.ephemeral().open(text) is None
    for i in range(len(text)):
        for letter in "AB_=":
            if letter != text[i]:
                assert seal.open(text[:i] + letter + text[i + 1 :]) is None
    assert [seal.open(other) for other in ("", "ossia1.", "ossia1.é", "gAAAA")] == [None] * 4


def test_a_key_file_is_made_once_and_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "deep" / "key"
    sealed = Seal.at(path).seal(b"x")
    assert Seal.at(path).open(sealed) == b"x"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["key"]
