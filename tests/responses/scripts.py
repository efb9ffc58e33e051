"""A scripted engine and turns to play on it, for tests of everything above the engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence

from ossia.engine.request import SamplingParams, TokenOutput
from ossia.engine.stops import Stop
from ossia.errors import ContextLengthError
from ossia.harmony import Tokenizer
from ossia.responses.loop import Model

TOKENIZER = Tokenizer.o200k_harmony()
_SPECIAL = re.compile(r"(<\|[a-z]+\|>)")

REASONED = "<|channel|>analysis<|message|>2 and 2 make 4.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>The answer is 4.<|return|>"
CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2, "b": 2}<|call|>'
PREAMBLE = "<|channel|>commentary<|message|>I shall add them.<|end|><|start|>assistant"


def tokens(text: str) -> list[int]:
    """Token ids of a script in which <|...|> are special tokens."""
    out: list[int] = []
    for piece in _SPECIAL.split(text):
        out += [TOKENIZER.special(piece)] if _SPECIAL.fullmatch(piece) else TOKENIZER.encode(piece)
    return out


class Scripted:
    """Yields the given token ids, answer by answer; remembers the prompts. The last script repeats."""

    def __init__(self, *scripts: str | Sequence[int], context: int = 100_000, delay_s: float = 0) -> None:
        self.scripts = [tokens(script) if isinstance(script, str) else list(script) for script in scripts]
        self.context, self.delay_s = context, delay_s
        self.prompts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.num_open = 0

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> int:
        if len(token_ids) + (params.max_tokens or 1) > self.context:
            raise ContextLengthError(f"{len(token_ids)} tokens do not fit {self.context}")
        return params.max_tokens or self.context - len(token_ids)

    def generate(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenOutput, None]:
        self.check(token_ids, params)
        return self._read(list(token_ids), params)

    async def _read(self, prompt: list[int], params: SamplingParams) -> AsyncGenerator[TokenOutput, None]:
        self.prompts.append(prompt)
        self.params.append(params)
        script = self.scripts[min(len(self.prompts), len(self.scripts)) - 1]
        limit = min(params.max_tokens or len(script), self.context - len(prompt))
        self.num_open += 1
        try:
            for i, token_id in enumerate(script[:limit]):
                await asyncio.sleep(self.delay_s)
                ended = "stop" if i + 1 == len(script) else "length" if i + 1 == limit else None
                logprob = -0.5 if params.logprobs else None
                top = tuple((token_id + k, -0.5 - k) for k in range(params.top_logprobs))
                stop = Stop((token_id,), i, None) if ended == "stop" else None
                yield TokenOutput(0, token_id, logprob, top, ended, stop, num_cached_tokens=7)
        finally:
            self.num_open -= 1


def model(*scripts: str | Sequence[int], **fields: object) -> Model:
    engine = fields.pop("engine", None) or Scripted(*scripts)
    return Model(name="gpt-oss-20b", engine=engine, tokenizer=TOKENIZER, today=_day, **fields)


def _day() -> str:
    return "2025-06-28"


Make = Callable[..., Model]
