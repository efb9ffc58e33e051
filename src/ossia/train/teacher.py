"""A teacher: a model that answers, and that says what it thinks of others' answers.

    LocalTeacher    any checkpoint that ossia opens
    ServerTeacher   `ossia serve`, vLLM, or another server of OpenAI's Completions that takes and tells token ids

Teacher and student must have one vocabulary: probabilities are compared token by token.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple, Protocol

import httpx
import numpy as np
import numpy.typing as npt

from ossia.engine import LLM, Engine, Runner, SamplingParams, TokenOutput
from ossia.errors import ConfigError, ContextLengthError, InputError, OssiaError, UnavailableError
from ossia.harmony import Tokenizer
from ossia.model.hub import resolve_model
from ossia.model.weights import Checkpoint, load_weights
from ossia.responses.loop import TokenSource
from ossia.train.actor import engine_options, make_ops
from ossia.train.rollout import Rollout
from ossia.train.rollout_config import DistillConfig, RolloutSettings
from ossia.train.teachings import check_vocabulary, other_vocabulary

# What servers give at most; ossia's and vLLM's do.
_MAX_SERVER_TOP = 20
_PROBE = "Zwei & 2 != 22, naïve façade — 漢字\n\tdef f(x): return x**2  <|end|> 0123456789"
_TIMEOUT_S = 600.0


class Scores(NamedTuple):
    """What a teacher thinks of the sampled tokens of a rollout: how likely each was, and what was likeliest."""

    logprobs_R: npt.NDArray[np.float32]
    top_ids_RK: npt.NDArray[np.int32]
    top_logprobs_RK: npt.NDArray[np.float32]


class Teacher(Protocol):
    """What distillation needs of one."""

    name: str

    def source(self) -> Callable[[], AbstractAsyncContextManager[TokenSource]] | Engine:
        """What `ossia.train.rollout.Rollouts` samples with."""

    def score(self, rollouts: Sequence[Rollout], top: int) -> list[Scores]:
        """What it thinks of rollouts, in order, with the ``top`` likeliest tokens at each place."""

    def close(self) -> None:
        """Free what it holds."""


def open_teacher(settings: DistillConfig, student: Tokenizer) -> Teacher:
    """Raises ConfigError where its vocabulary is not the student's, and the errors of opening or reaching it."""
    if settings.teacher.startswith(("http://", "https://")):
        return ServerTeacher(settings, student)
    return LocalTeacher(settings, student)


class LocalTeacher:
    """A checkpoint in an engine of its own."""

    def __init__(self, settings: DistillConfig, student: Tokenizer) -> None:
        checkpoint = Checkpoint.open(resolve_model(settings.teacher))
        tokenizer = checkpoint.tokenizer()
        check_vocabulary(settings.teacher, tokenizer, student)
        ops = make_ops(settings)
        weights = load_weights(checkpoint, ops)
        options = engine_options(settings, record_routing=False)
        self.name = settings.teacher
        self._engine = Engine(Runner(ops, checkpoint.config, weights, options), token_bytes=tokenizer.token_bytes)

    def source(self) -> Engine:
        return self._engine

    def score(self, rollouts: Sequence[Rollout], top: int) -> list[Scores]:
        prompts = [one.token_ids_L.tolist() for one in rollouts]
        params = [
            SamplingParams(max_tokens=1, top_logprobs=top, score_from=int(np.flatnonzero(one.sampled_L)[0]))
            for one in rollouts
        ]
        done = LLM(self._engine).generate(prompts, params)
        found = []
        for rollout, asked, one in zip(rollouts, params, done, strict=True):
            assert asked.score_from is not None
            # Of tokens that a tool has said in between nothing is learned.
            scores = [one.prompt_logprobs[i - asked.score_from] for i in np.flatnonzero(rollout.sampled_L)]
            found.append(_scores([(each.logprob, each.top_logprobs) for each in scores]))
        return found

    def close(self) -> None:
        self._engine.close()


class ServerTeacher:
    """A server. Prompts and answers go over the wire as token ids, never as text."""

    def __init__(self, settings: DistillConfig, student: Tokenizer) -> None:
        """Raises UnavailableError where the server cannot be reached or does not tell token ids, ConfigError for
        another vocabulary or more likeliest tokens than servers tell."""
        self.name = settings.teacher
        if settings.top > _MAX_SERVER_TOP:
            raise ConfigError(
                f"top is {settings.top}; servers tell the {_MAX_SERVER_TOP} likeliest tokens at most", param="top"
            )
        self._top = settings.top
        self._concurrent = settings.concurrent
        self._url = settings.teacher.rstrip("/")
        self._headers = _headers(settings)
        self._model = settings.teacher_model or self._only_model()
        self._stop_ids = student.stop_ids
        # The longest prompt and answer together is the server's affair; what it refuses ends a rollout.
        self._check_vocabulary(student)

    def source(self) -> Callable[[], AbstractAsyncContextManager[TokenSource]]:
        @asynccontextmanager
        async def opened() -> AsyncIterator[TokenSource]:
            async with httpx.AsyncClient(headers=self._headers, timeout=_TIMEOUT_S) as client:
                yield _ServerSource(self, client, asyncio.Semaphore(self._concurrent))

        return opened

    def score(self, rollouts: Sequence[Rollout], top: int) -> list[Scores]:
        with ThreadPoolExecutor(min(self._concurrent, 16)) as threads:
            return list(threads.map(lambda one: self._score(one, top), rollouts))

    def close(self) -> None:
        """Nothing is held between calls."""

    def body(self, prompt: Sequence[int], **fields: Any) -> dict[str, Any]:
        """A request that is answered with token ids."""
        return {
            "model": self._model,
            "prompt": list(prompt),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **fields,
        }

    @property
    def completions_url(self) -> str:
        return f"{self._url}/completions"

    def sampling(self, params: SamplingParams) -> dict[str, Any]:
        return {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "seed": params.seed,
            "logprobs": self._top,
            "stop_token_ids": list(self._stop_ids),
            "skip_special_tokens": False,
        }

    def outputs(self, choice: dict[str, Any]) -> list[TokenOutput]:
        """A choice of the answer as tokens of an engine."""
        ids, told = choice.get("token_ids"), choice.get("logprobs") or {}
        if not isinstance(ids, list) or len(told.get("token_logprobs") or ()) != len(ids):
            raise _tells_no_ids(self._url)
        # A server that goes on behind <|call|> would make up the tool's answer.
        end = next((i + 1 for i, token_id in enumerate(ids) if token_id in self._stop_ids), len(ids))
        is_stopped = end < len(ids) or (bool(ids) and ids[-1] in self._stop_ids)
        reason: Any = "stop" if is_stopped or choice.get("finish_reason") == "stop" else "length"
        outputs = []
        for i, token_id in enumerate(ids[:end]):
            top = [(_token_id(name), float(value)) for name, value in (told["top_logprobs"][i] or {}).items()]
            top = sorted(top, key=lambda one: (-one[1], one[0]))[: self._top]
            logprob = float(told["token_logprobs"][i])
            finish_reason = reason if i + 1 == end else None
            outputs.append(
                TokenOutput(0, token_id, logprob, tuple(top), finish_reason=finish_reason, drawn_logprob=logprob)
            )
        return outputs

    def _score(self, rollout: Rollout, top: int) -> Scores:
        token_ids = rollout.token_ids_L.tolist()
        answer = self._post(self.body(token_ids, max_tokens=1, prompt_logprobs=top, temperature=1.0))
        told = answer["choices"][0].get("prompt_logprobs")
        if not isinstance(told, list) or len(told) != len(token_ids):
            raise UnavailableError(
                f"{self._url} does not tell how likely the tokens of a prompt are (prompt_logprobs), which learning on "
                "policy needs; `ossia serve` and vLLM do. Learn offline, or from such a server"
            )
        rows = []
        for i in np.flatnonzero(rollout.sampled_L):
            likely = {int(name): float(one["logprob"]) for name, one in told[i].items()}
            ordered = sorted(likely.items(), key=lambda one: (-one[1], one[0]))
            rows.append((likely[token_ids[i]], tuple(ordered[:top])))
        return _scores(rows)

    def _only_model(self) -> str:
        listed = self._get("models").get("data") or []
        if not listed:
            raise UnavailableError(f"{self._url} lists no model; give its name as teacher_model")
        # Other names of one model come behind it.
        return str(listed[0]["id"])

    def _check_vocabulary(self, student: Tokenizer) -> None:
        """The server encodes a text with letters, digits, signs and more; the student must spell it alike."""
        body = self.body([], max_tokens=1, logprobs=1) | {"prompt": _PROBE}
        choice = self._post(body)["choices"][0]
        theirs, ours = choice.get("prompt_token_ids"), student.encode(_PROBE)
        if not isinstance(theirs, list):
            raise _tells_no_ids(self._url)
        if theirs != ours:
            place = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), len(ours))
            raise other_vocabulary(
                self._url, f"its token {place} of a probe is {theirs[place : place + 1]}, not {ours[place : place + 1]}"
            )

    def _get(self, path: str) -> dict[str, Any]:
        return _answer(self._url, lambda: httpx.get(f"{self._url}/{path}", headers=self._headers, timeout=30.0))

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        return _answer(
            self._url, lambda: httpx.post(self.completions_url, json=body, headers=self._headers, timeout=_TIMEOUT_S)
        )


class _ServerSource:
    """A server as a `TokenSource`."""

    def __init__(self, teacher: ServerTeacher, client: httpx.AsyncClient, turns: asyncio.Semaphore) -> None:
        self._teacher, self._client, self._turns = teacher, client, turns

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> int:
        return params.max_tokens or 1 << 30

    async def generate(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenOutput, None]:
        teacher = self._teacher
        async with self._turns:
            try:
                response = await self._client.post(
                    teacher.completions_url, json=teacher.body(token_ids, **teacher.sampling(params))
                )
            except httpx.HTTPError as error:
                raise _unreachable(teacher.name, error) from error
        for output in teacher.outputs(_read(teacher.name, response)["choices"][0]):
            yield output


def _scores(rows: Sequence[tuple[float, tuple[tuple[int, float], ...]]]) -> Scores:
    return Scores(
        np.array([logprob for logprob, _ in rows], np.float32),
        np.array([[i for i, _ in top] for _, top in rows], np.int32),
        np.array([[value for _, value in top] for _, top in rows], np.float32),
    )


def _token_id(name: str) -> int:
    number = name.removeprefix("token_id:")
    if number == name or not number.isdecimal():
        raise UnavailableError(
            f"the teacher's server names a token {name[:40]!r}, not by its id (return_tokens_as_token_ids); "
            "`ossia serve` and vLLM can"
        )
    return int(number)


def _headers(settings: RolloutSettings) -> dict[str, str]:
    name = settings.teacher_key if isinstance(settings, DistillConfig) else ""
    if not name:
        return {}
    if name not in os.environ:
        raise ConfigError(f"teacher_key names the environment variable {name}, which is not set", param="teacher_key")
    return {"Authorization": f"Bearer {os.environ[name]}"}


def _answer(url: str, ask: Callable[[], httpx.Response]) -> dict[str, Any]:
    try:
        return _read(url, ask())
    except httpx.HTTPError as error:
        raise _unreachable(url, error) from error


def _read(url: str, response: httpx.Response) -> dict[str, Any]:
    try:
        said = response.json()
    except ValueError:
        said = {}
    if response.status_code == 200 and isinstance(said, dict):
        return said
    error = said.get("error") if isinstance(said, dict) else None
    message = error.get("message") if isinstance(error, dict) else response.text[:200]
    if isinstance(error, dict) and error.get("code") == "context_length_exceeded":
        raise ContextLengthError(f"{url}: {message}")
    kind: type[OssiaError] = InputError if 400 <= response.status_code < 500 else UnavailableError
    raise kind(f"{url} answered with status {response.status_code}: {message}")


def _unreachable(url: str, error: httpx.HTTPError) -> UnavailableError:
    return UnavailableError(f"the teacher at {url} cannot be reached: {type(error).__name__}: {error}")


def _tells_no_ids(url: str) -> UnavailableError:
    return UnavailableError(
        f"{url} does not tell the ids of tokens (return_token_ids), without which a teacher cannot be learned from; "
        "`ossia serve` and vLLM do"
    )
