"""Rollouts: a model does exercises, many at once, with tools in the loop; what was sampled is kept token by token.

    prompt            rendered once
    sampled           as the engine drew it: never decoded and encoded again, never rendered anew
    tool's answer     rendered alone and appended; then <|start|>assistant, and the model goes on
    ... until <|return|>, or a limit

A rollout is the token list that the engine saw, with a mark for each token that the model sampled, its log-probability
and the experts that every token went to. Training reads these and nothing that was rendered from text.

Shapes   L tokens of one rollout; layers, A experts per token; K likeliest tokens at one place.
Sources  why tokens must not be rendered again, and why the router's choices are replayed: arXiv:2510.11370.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import NamedTuple, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from ossia.engine import NO_TOKEN, AsyncEngine, Constraint, Engine, FinishReason, SamplingParams, TokenOutput
from ossia.engine.masks import GrammarCompiler
from ossia.errors import ContextLengthError, InputError
from ossia.harmony import (
    Message,
    ParsedMessage,
    StreamParser,
    Tokenizer,
    ToolNamespace,
    render_for_completion,
    render_message,
    tool_message,
)
from ossia.harmony.grammar import TurnGrammar, declared_grammar
from ossia.responses.loop import TokenSource
from ossia.tools.base import Tool
from ossia.tools.python import PythonSessions
from ossia.tools.registry import find
from ossia.train.data import Sample
from ossia.train.tasks.base import Draw, Reward, Transcript, conversation, namespaces

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class RolloutConfig:
    """How exercises are done."""

    # Tokens that the model may sample for one exercise, all its turns together; what comes later is cut off.
    max_tokens: int = 512
    # Calls of tools in one exercise.
    max_calls: int = 8
    # Seconds that one call may take.
    tool_timeout_s: float = 30.0
    # Temperature of the draws; training takes place at the same temperature. 0 takes the likeliest tokens.
    temperature: float = 1.0
    # Whether malformed messages, calls of unknown tools and answers that break their schema are excluded by a grammar.
    grammar: bool = False
    # What confines the python tool, as the setting python_sandbox.
    python_sandbox: str = "auto"
    # Whether the python tool runs with no sandbox at all.
    unsafe_python: bool = False
    # Sandboxes of the python tool that live at once.
    max_python: int = 8

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("max_calls", 0), ("tool_timeout_s", 0), ("max_python", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least {least}", param=name)
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; expected at least 0", param="temperature")


class Dealer(Protocol):
    """Processes that do a part each: `ossia.train.parallel.Team`."""

    def deal(self, items: Sequence[T], do: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """What ``do`` makes of all items, in order, in every process."""


class Exercise(NamedTuple):
    """One rollout to be done: what is asked, and the seed of its draws."""

    draw: Draw
    seed: int


@dataclass(frozen=True, eq=False)
class Rollout:
    """One exercise done: all tokens from the prompt to the last one sampled, and what became of it."""

    draw: Draw
    token_ids_L: npt.NDArray[np.int32]
    # Tokens that the model sampled; the others are the prompt's and what tools answered.
    sampled_L: npt.NDArray[np.bool_]
    # Log-probabilities of the sampled tokens, 0 elsewhere: in the distribution drawn from, and the model's own.
    drawn_logprobs_L: npt.NDArray[np.float32]
    model_logprobs_L: npt.NDArray[np.float32]
    transcript: Transcript
    reward: Reward
    # The experts of all tokens but the last, if they were recorded.
    routing_LA: npt.NDArray[np.uint16] | None = None
    # The likeliest tokens at the place of each sampled token, in order, if asked for.
    top_ids_RK: npt.NDArray[np.int32] | None = None
    top_logprobs_RK: npt.NDArray[np.float32] | None = None
    num_calls: int = 0

    @property
    def num_sampled(self) -> int:
        return int(self.sampled_L.sum())

    def without_draw(self) -> Rollout:
        """What another process is told of it, which knows the exercise."""
        return replace(self, draw=None)  # type: ignore[arg-type]

    def sample(self) -> Sample:
        """The rollout as training data: sampled tokens weigh 1, all others nothing."""
        return Sample(self.token_ids_L, self.sampled_L.astype(np.float32), self.draw.effort, origin=self.draw.task.name)


def rollout_seed(seed: int, *numbers: int) -> int:
    """A seed of 63 bits for one rollout of a run, from the run's and its place in it."""
    text = " ".join(map(str, (seed, *numbers)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Rollouts:
    """Does exercises with one model. Use it as a context manager: it holds an event loop, and sandboxes of python.

    Exercises with the same prompt share its keys and values in the engine.
    """

    def __init__(
        self,
        source: Engine | Callable[[], AbstractAsyncContextManager[TokenSource]],
        tokenizer: Tokenizer,
        config: RolloutConfig,
        *,
        routing: bool = False,
        top_logprobs: int = 0,
        adapter: str | None = None,
        team: Dealer | None = None,
    ) -> None:
        """``adapter`` is the engine's name of the one that all go through; exercises are dealt out to ``team``.

        ``routing`` asks the engine for the experts of each token; it must have been set up with record_routing.
        """
        self._source = (lambda: AsyncEngine(source)) if isinstance(source, Engine) else source
        self.tokenizer = tokenizer
        self._config = config
        self._routing = routing
        self._top_logprobs = top_logprobs
        self._adapter = adapter
        self._team = team
        self._opening = render_for_completion([], tokenizer)
        self._compiler = GrammarCompiler(tokenizer) if config.grammar else None
        self._runner = asyncio.Runner()
        self._sessions: PythonSessions | None = None
        self._num_done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the sandboxes and the event loop."""
        if self._sessions is not None:
            self._runner.run(self._sessions.aclose())
            self._sessions = None
        self._runner.close()

    def run(self, exercises: Sequence[Exercise]) -> list[Rollout]:
        """All of them, in order. Raises the first error of the engine or of a task, ending the others."""
        if self._team is None:
            return self._runner.run(self._run(exercises))
        # A task's instances may be such as cannot travel, and every process has them.
        travels = self._team.deal(
            exercises, lambda own: [one.without_draw() for one in self._runner.run(self._run(own))]
        )
        return [replace(one, draw=exercise.draw) for one, exercise in zip(travels, exercises, strict=True)]

    async def _run(self, exercises: Sequence[Exercise]) -> list[Rollout]:
        if self._sessions is None and any(one.draw.task.python for one in exercises):
            config = self._config
            self._sessions = PythonSessions(
                config.python_sandbox,
                unsafe_python=config.unsafe_python,
                max_sessions=config.max_python,
                num_warm=min(2, config.max_python),
            )
            # Before anything is sampled: a machine without a sandbox is to be known at once.
            await self._sessions.check()
        turns = asyncio.Semaphore(self._config.max_python)
        tasks = []
        try:
            async with self._source() as source, asyncio.TaskGroup() as group:
                for exercise in exercises:
                    self._num_done += 1
                    one = _Exercise(self, source, exercise, f"rollout-{self._num_done}", turns)
                    tasks.append(group.create_task(one.run()))
        except BaseExceptionGroup as errors:
            # The others were cancelled on its account.
            raise _first(errors) from None
        return [task.result() for task in tasks]


@dataclass
class _Tokens:
    """The tokens of a rollout under way, and what is known of each."""

    token_ids: list[int]
    sampled: list[bool] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    routing: list[npt.NDArray[np.uint16]] = field(default_factory=list)

    def __post_init__(self) -> None:
        given, self.token_ids = self.token_ids, []
        self.give(given)

    def give(self, token_ids: Sequence[int]) -> None:
        """Tokens that the model did not sample."""
        self.token_ids += token_ids
        self.sampled += [False] * len(token_ids)
        self.drawn += [0.0] * len(token_ids)
        self.logprobs += [0.0] * len(token_ids)

    def take(self, output: TokenOutput) -> None:
        assert output.logprob is not None and output.drawn_logprob is not None
        self.token_ids.append(output.token_id)
        self.sampled.append(True)
        self.drawn.append(output.drawn_logprob)
        self.logprobs.append(output.logprob)
        self.top.append(output.top_logprobs)

    def note_routing(self, experts_LA: npt.NDArray[np.uint16]) -> None:
        """What an earlier turn has recorded stays: its tokens were drawn with it."""
        known = sum(map(len, self.routing))
        self.routing.append(experts_LA[known:])


class _Exercise:
    """One exercise under way."""

    def __init__(
        self, rollouts: Rollouts, source: TokenSource, exercise: Exercise, key: str, turns: asyncio.Semaphore
    ) -> None:
        self._rollouts, self._source, self._key, self._turns = rollouts, source, key, turns
        self._draw, self._seed = exercise
        self._config = rollouts._config
        self._tokenizer = rollouts.tokenizer
        self._messages: list[Message] = []
        self._defects: list[str] = []
        self._is_truncated = False
        self._num_calls = 0
        self._has_session = False

    async def run(self) -> Rollout:
        task, instance = self._draw.task, self._draw.instance
        async with AsyncExitStack() as stack:
            tools = list(task.tools(instance))
            for tool in tools:
                stack.push_async_callback(tool.close)
            spaces = namespaces(task, tools)
            if task.python:
                assert self._rollouts._sessions is not None
                tools.append(self._rollouts._sessions.tool(self._key))
                stack.push_async_callback(self._end_session)
            asked = conversation(self._draw, spaces)
            tokens = _Tokens(render_for_completion(asked, self._tokenizer))
            grammar = declared_grammar(asked.messages, strict=False) if self._config.grammar else None
            while (call := await self._turn(tokens, grammar)) is not None:
                answer = tool_message(call.recipient or "", call.channel, await self._answer(call, tools))
                self._messages.append(answer)
                tokens.give(render_message(answer, self._tokenizer))
                tokens.give(self._rollouts._opening)
        if not self._is_truncated and not self._has_answer:
            self._defects.append("no_answer")
        transcript = Transcript(tuple(self._messages), tuple(self._defects), self._is_truncated)
        return self._rollout(tokens, transcript)

    async def _turn(self, tokens: _Tokens, grammar: TurnGrammar | None) -> ParsedMessage | None:
        """One generation; the call that it ends with, if there is one to be answered."""
        room = self._config.max_tokens - sum(tokens.sampled)
        try:
            room = min(room, self._source.check(tokens.token_ids, SamplingParams()))
        except ContextLengthError:
            # A prompt that never fits is a fault of the settings and not of the model.
            if not any(tokens.sampled):
                raise
            room = 0
        if room < 1:
            self._is_truncated = True
            return None
        params = SamplingParams(
            temperature=self._config.temperature,
            seed=self._seed,
            max_tokens=room,
            stop_token_ids=self._tokenizer.stop_ids,
            logprobs=True,
            drawn_logprobs=True,
            top_logprobs=self._rollouts._top_logprobs,
            routing=self._rollouts._routing,
            constraint=self._constraint(grammar),
            adapter=self._rollouts._adapter,
        )
        parser = StreamParser(self._tokenizer)
        finish_reason: FinishReason | None = None
        has_sampled = any(tokens.sampled)
        try:
            async with aclosing(self._source.generate(list(tokens.token_ids), params)) as outputs:
                async for output in outputs:
                    finish_reason = output.finish_reason
                    if output.token_id != NO_TOKEN:
                        tokens.take(output)
                        parser.feed(output.token_id)
                    if output.routing is not None:
                        tokens.note_routing(output.routing)
        except ContextLengthError:
            # A server tells its context only so.
            if not has_sampled:
                raise
            self._is_truncated = True
            return None
        parser.close()
        return self._read(parser.messages, finish_reason)

    def _read(self, said: Sequence[ParsedMessage], finish_reason: FinishReason | None) -> ParsedMessage | None:
        """Take note of the messages of one generation; the call that is to be answered."""
        self._messages += [one.message for one in said]
        self._defects += [defect for one in said for defect in one.defects]
        if finish_reason == "length":
            self._is_truncated = True
            return None
        last = said[-1] if said else None
        if last is None or last.stop != "<|call|>":
            if last is None or last.stop != "<|return|>":
                self._defects.append("no_return")
            return None
        if last.recipient is None:
            self._defects.append("call_of_nothing")
            return None
        if self._num_calls >= self._config.max_calls:
            self._is_truncated = True
            return None
        self._num_calls += 1
        return last

    async def _answer(self, call: ParsedMessage, tools: Sequence[Tool]) -> str:
        """What the tool says; whatever the model called, there is an answer."""
        recipient = call.recipient or ""
        found = find(tools, recipient) or find(tools, recipient.removeprefix("functions."))
        if found is None:
            self._defects.append("unknown_tool")
            names = [name for space in map(_namespace, tools) for name in _recipients(space)]
            return f"Unknown tool: {recipient}. " + (
                f"The tools are: {', '.join(names)}." if names else "There are no tools; answer without."
            )
        tool, name = found
        if tool.namespace.name == "python" and not self._has_session:
            # A sandbox is held to the end of the exercise.
            await self._turns.acquire()
            self._has_session = True
        try:
            async with asyncio.timeout(self._config.tool_timeout_s):
                return (await tool.run(name, call.message.text)).text
        except TimeoutError:
            return f"Error: {recipient} gave no answer within {self._config.tool_timeout_s:g} seconds"

    async def _end_session(self) -> None:
        if self._has_session:
            assert self._rollouts._sessions is not None
            await self._rollouts._sessions.end_session(self._key)
            self._turns.release()

    def _constraint(self, grammar: TurnGrammar | None) -> Constraint | None:
        if grammar is None:
            return None
        assert self._rollouts._compiler is not None
        return self._rollouts._compiler.constraint(grammar)

    @property
    def _has_answer(self) -> bool:
        return Transcript(tuple(self._messages)).answer is not None

    def _rollout(self, tokens: _Tokens, transcript: Transcript) -> Rollout:
        task = self._draw.task
        reward = task.score(self._draw.instance, transcript)
        if not 0 <= reward.value <= 1:
            raise InputError(f"the task {task.name}: score gave {reward.value}; expected a number from 0 to 1")
        has_top = self._rollouts._top_logprobs > 0
        # What a tool answered where there was no room to go on is nobody's.
        length = 1 + max(i for i, is_sampled in enumerate(tokens.sampled) if is_sampled)
        return Rollout(
            draw=self._draw,
            token_ids_L=np.array(tokens.token_ids[:length], np.int32),
            sampled_L=np.array(tokens.sampled[:length], np.bool_),
            drawn_logprobs_L=np.array(tokens.drawn[:length], np.float32),
            model_logprobs_L=np.array(tokens.logprobs[:length], np.float32),
            transcript=transcript,
            reward=reward,
            routing_LA=np.concatenate(tokens.routing) if self._rollouts._routing else None,
            top_ids_RK=np.array([[i for i, _ in row] for row in tokens.top], np.int32) if has_top else None,
            top_logprobs_RK=np.array([[p for _, p in row] for row in tokens.top], np.float32) if has_top else None,
            num_calls=self._num_calls,
        )


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _namespace(tool: Tool) -> ToolNamespace:
    return tool.namespace


def _recipients(space: ToolNamespace) -> list[str]:
    return [f"{space.name}.{one.name}" for one in space.tools] or [space.name]
