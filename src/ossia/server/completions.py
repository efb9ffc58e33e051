"""Completions over HTTP: raw prompts, as text or as token ids, without the chat format."""

from __future__ import annotations

import codecs
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from fastapi import APIRouter
from openai.types import Completion
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from ossia.engine.request import NO_TOKEN, SamplingParams, Scored, TokenOutput
from ossia.errors import InputError, OssiaError, UnsupportedError
from ossia.responses.events import DONE
from ossia.responses.loop import Model, Phase, engine_phases
from ossia.responses.schema import Json, dumps, new_id
from ossia.server.places import named_as
from ossia.server.sampled import HINTS, Sampled
from ossia.server.service import Service, beside_if_long
from ossia.server.stream import EventStream, JSONResponse, error_chunk, merged, opened, together, while_there


class CompletionRequest(Sampled):
    """The body of POST /v1/completions: a raw prompt, as text or as token ids."""

    prompt: str | list[int] | list[str] | list[list[int]] = ""
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    # As vLLM has them: how likely the prompt's tokens were; ids of all tokens; ids in place of texts in logprobs.
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @property
    def scores_prompt(self) -> bool:
        return self.prompt_logprobs is not None or (bool(self.echo) and self.logprobs is not None)


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["Completions"], default_response_class=JSONResponse)

    @routes.post("/completions", responses={200: {"model": Completion}}, summary="Complete a raw prompt")
    async def complete(body: CompletionRequest, request: Request) -> HttpResponse:
        model = service.model_of(body.model)
        name, num = new_id("cmpl"), body.n or 1

        def read() -> list[_Raw]:
            prompts = _prompts(service, body)
            return [_Raw(service, model, body, prompt, i, name) for prompt in prompts for i in range(num)]

        with named_as([("token_ids", "prompt"), ("stop_strings", "stop")]):
            made = await beside_if_long(body.prompt, read)
        headers = service.ignored(body, hints=HINTS)
        frame: Json = {"id": name, "created": int(time.time()), "model": model.name}
        frame["object"] = "text_completion"
        if body.stream:
            return EventStream(await opened(request, _raw_chunks(service, made, frame, body)), headers)

        async def whole() -> None:
            async with service.turn([one.phases for one in made]):
                await together([one.finish() for one in made])

        await while_there(request, whole())
        choices = [one.choice(i) for i, one in enumerate(made)]
        return JSONResponse({**frame, "choices": choices, "usage": _raw_usage(made)}, headers=headers)

    return routes


def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    if body.suffix:
        raise UnsupportedError("suffix is not offered: gpt-oss does not fill in the middle", param="suffix")
    given = body.prompt
    encode = service.model.tokenizer.encode
    if isinstance(given, str):
        return [encode(given)]
    if all(isinstance(one, int) for one in given):
        return [[one for one in given if isinstance(one, int)]]
    if len(given) > 64:
        raise InputError(f"{len(given)} prompts in one request; expected at most 64", param="prompt")
    return [encode(one) if isinstance(one, str) else one for one in given if not isinstance(one, int)]


class _Piece(NamedTuple):
    """More of a completion's text, and the log-probabilities of its tokens if they were asked for."""

    text: str
    logprobs: Json | None


class _Raw:
    """One of the choices of a prompt that is being completed."""

    def __init__(
        self,
        service: Service,
        model: Model,
        body: CompletionRequest,
        prompt: list[int],
        choice: int,
        completion_id: str,
    ) -> None:
        self._service, self._model, self._body, self.prompt, self._completion_id = (
            service,
            model,
            body,
            prompt,
            completion_id,
        )
        self.is_first = choice == 0
        self.num_output, self.num_cached = 0, 0
        self.phases: list[Phase] = []
        self.finish_reason: str | None = None
        self.text = ""
        self.token_ids: list[int] = []
        self.prompt_logprobs: list[Json | None] = [None]
        self.logprobs: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        # How many of their tokens have been told, and the characters of the text up to the last that was noted.
        self._num_told = self._num_chars = 0
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        wanted = body.logprobs is not None
        self._params = SamplingParams(
            **{
                **model.sampled(temperature=body.temperature, top_p=body.top_p),
                "max_tokens": 16 if body.max_tokens is None else max(body.max_tokens, 1),
                "stop_strings": body.stops,
                "logprobs": wanted,
                "top_logprobs": max(body.logprobs or 0, body.prompt_logprobs or 0),
                "score_from": 1 if body.scores_prompt and len(prompt) > 1 else None,
                **body.sampling(choice),
            }
        )
        if self._runs:
            # Fails before anything is sent.
            model.engine.check(prompt, self._params)

    @property
    def _runs(self) -> bool:
        return self._body.max_tokens != 0 or self._params.score_from is not None

    async def pieces(self) -> AsyncGenerator[_Piece, None]:
        """The text as it comes; the text of a stop is not part of it."""
        tokenizer = self._model.tokenizer
        echoed = self.text = tokenizer.decode(self.prompt) if self._body.echo else ""
        if self._body.echo and self._body.logprobs is not None and self.prompt:
            self._note(self.prompt[0], None, ())
        if not self._runs:
            self.finish_reason = "length"
        # Where it is scored, it waits for its log-probabilities, which come with the first token.
        if echoed and self._params.score_from is None:
            yield self.piece(echoed)
            echoed = ""
        if not self._runs:
            return
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        data, num_told = b"", 0
        async with aclosing(self._outputs()) as outputs:
            async for output in outputs:
                if output.token_id == NO_TOKEN:
                    continue
                if output.prompt_logprobs:
                    self._note_prompt(output.prompt_logprobs)
                if echoed:
                    yield self.piece(echoed)
                    echoed = ""
                if self._body.max_tokens == 0:
                    # Only the prompt was asked about; the engine has to sample one token to read it.
                    self.finish_reason = "length"
                    continue
                self.num_output += 1
                self.token_ids.append(output.token_id)
                self.num_cached = output.num_cached_tokens
                end = None
                if output.stop is not None:
                    end = output.stop.num_bytes if isinstance(output.stop.match, str) else len(data)
                data += tokenizer.token_bytes(output.token_id)
                if output.logprob is not None and self._body.logprobs is not None:
                    self._note(output.token_id, output.logprob, output.top_logprobs[: self._body.logprobs])
                if output.finish_reason is not None:
                    self.finish_reason = "length" if output.finish_reason == "length" else "stop"
                known = len(data) - output.held_bytes if end is None else end
                piece = utf8.decode(data[num_told:known], final=output.finish_reason is not None)
                num_told = max(num_told, known)
                self.text += piece
                if piece:
                    yield self.piece(piece)

    async def _outputs(self) -> AsyncGenerator[TokenOutput, None]:
        """What the engine says."""
        begin_ns, first_ns = time.time_ns(), 0
        try:
            async with aclosing(self._model.engine.generate(self.prompt, self._params)) as outputs:
                async for output in outputs:
                    first_ns = first_ns or time.time_ns()
                    yield output
        finally:
            spent = engine_phases(begin_ns, first_ns, len(self.prompt), self.num_cached, self.num_output)
            self._service.note([*self.phases, *spent], self._completion_id)

    async def finish(self) -> None:
        async with aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass

    def piece(self, text: str) -> _Piece:
        """More text, with the log-probabilities that have not been told yet."""
        begin, self._num_told = self._num_told, len(self.logprobs["tokens"])
        if begin == self._num_told:
            return _Piece(text, None)
        return _Piece(text, {name: values[begin:] for name, values in self.logprobs.items()})

    def choice(self, index: int) -> Json:
        logprobs = self.logprobs if self._body.logprobs is not None else None
        choice: Json = {"index": index, "text": self.text, "logprobs": logprobs, "finish_reason": self.finish_reason}
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self.prompt_logprobs
        if self._body.return_token_ids:
            choice |= {"token_ids": self.token_ids, "prompt_token_ids": self.prompt}
        return choice

    def _note(self, token_id: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> None:
        """``logprob`` None: of the first token of a prompt, which nothing precedes."""
        self.logprobs["tokens"].append(self._name(token_id))
        self.logprobs["token_logprobs"].append(logprob)
        # The token itself stands there in any case.
        said = {self._name(one): value for one, value in (*top, *([] if logprob is None else [(token_id, logprob)]))}
        self.logprobs["top_logprobs"].append(said or None)
        self.logprobs["text_offset"].append(self._num_chars)
        self._num_chars += len(self._characters.decode(self._model.tokenizer.token_bytes(token_id)))

    def _note_prompt(self, scores: Sequence[Scored]) -> None:
        decode = self._model.tokenizer.decode
        for token_id, scored in zip(self.prompt[1:], scores, strict=True):
            if self._body.echo and self._body.logprobs is not None:
                self._note(token_id, scored.logprob, scored.top_logprobs[: self._body.logprobs])
            if self._body.prompt_logprobs is not None:
                likeliest = scored.top_logprobs[: self._body.prompt_logprobs]
                told: dict[int, tuple[float, int | None]] = {
                    one: (value, rank) for rank, (one, value) in enumerate(likeliest, start=1)
                }
                # The prompt's own token stands there in any case; how far down it is, is not known.
                told.setdefault(token_id, (scored.logprob, None))
                self.prompt_logprobs.append(
                    {
                        str(one): {"logprob": value, "rank": rank, "decoded_token": decode([one])}
                        for one, (value, rank) in told.items()
                    }
                )

    def _name(self, token_id: int) -> str:
        if self._body.return_tokens_as_token_ids:
            return f"token_id:{token_id}"
        spelling = self._model.tokenizer.token_bytes(token_id)
        try:
            return spelling.decode()
        # As OpenAI names parts of characters, each its own way.
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)


def _raw_usage(made: list[_Raw]) -> Json:
    # The choices of a prompt share it: it counts once.
    prompts = [one for one in made if one.is_first]
    num_prompt, num_output = sum(len(one.prompt) for one in prompts), sum(one.num_output for one in made)
    details = {"cached_tokens": sum(one.num_cached for one in prompts)}
    return {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": details}  # fmt: skip


async def _raw_chunks(
    service: Service, made: list[_Raw], frame: Json, body: CompletionRequest
) -> AsyncGenerator[bytes, None]:
    def chunk(choices: list[Json], **fields: Any) -> bytes:
        return b"data: %b\n\n" % dumps({**frame, "choices": choices, **fields})

    has_begun = False
    try:
        sources = [one.pieces() for one in made]
        async with service.turn([one.phases for one in made]), aclosing(merged(sources)) as pieces:
            async for index, piece in pieces:
                yield chunk([{"index": index, **piece._asdict(), "finish_reason": None}])
                has_begun = True
    except OssiaError as error:
        if not has_begun:
            raise
        yield error_chunk(error)
        yield DONE
        return
    for index, one in enumerate(made):
        yield chunk([{**one.choice(index), **one.piece("")._asdict()}])
    if body.stream_options and body.stream_options.include_usage:
        yield chunk([], usage=_raw_usage(made))
    yield DONE
