"""A conversation with a model and its tools, from Python: it thinks, calls, reads what came back, and answers.

with ossia.Agent(model, tools=["python", weather]) as agent:
    print(agent.ask("How warm is it in Oslo, in kelvin?").read())
    print(agent.ask("And in Rome?").read())

Every generation is sampled under the grammar of the tools and of the output schema. The tokens of a turn that goes on
behind a call are those that the model sampled, whatever they would be rendered as.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from ossia.engine import FinishReason
from ossia.errors import ContextLengthError, InputError
from ossia.harmony import (
    Channel,
    Conversation,
    Delta,
    Effort,
    Message,
    ParsedMessage,
    Role,
    render_for_completion,
    tool_message,
)
from ossia.harmony.grammar import AUTO, ToolChoice
from ossia.harmony.render import render_message
from ossia.local import Generation, LocalModel, Messages, make_conversation, read_messages
from ossia.tools.base import Tool
from ossia.tools.functions import FunctionTools
from ossia.tools.registry import Workshop, find, merged

T = TypeVar("T")

_log = logging.getLogger(__name__)

_DECLINED = "Error: the user has declined this call."


class Agent:
    """One conversation. For one thread at a time; the tools run in a thread of their own."""

    def __init__(
        self,
        model: LocalModel,
        *,
        tools: Sequence[str | Callable[..., Any] | Tool] = (),
        instructions: str | None = None,
        effort: Effort | str | None = None,
        output_schema: Mapping[str, Any] | None = None,
        current_date: str | None = None,
        messages: Messages = (),
        max_calls: int = 32,
        approve: Callable[[Message], bool | Awaitable[bool]] | None = None,
        **sampling: Any,
    ) -> None:
        """``tools`` are functions, with or without @ossia.tool; names: "python" runs code in a sandbox, which is proven
        first, "browser" and "apply_patch" work where the model's settings say (``ossia.load(..., browser=...)``); and
        objects that are an `ossia.tools.base.Tool`, which the agent closes with itself.

        ``messages`` are the conversation so far. ``approve``, which may be async, is asked before each call, with its
        message, whose text is the code or the JSON of the arguments: what it does not answer with True is not run, and
        the model is told so. After ``max_calls`` calls in one answer no further one can be sampled. The rest is as in
        `LocalModel.generate`; ``max_tokens`` counts all that is sampled for an answer.

        Raises InputError, ConfigError for a tool that is unknown or lacks a setting, and UnavailableError if no sandbox
        holds, with what to install.
        """
        if not isinstance(model, LocalModel):
            raise InputError(f"model is {model!r:.80}; expected what ossia.load gives", param="model")
        for name in ("constraint", "ignore_eos", "min_tokens"):
            if sampling.get(name):
                raise InputError(f"{name} cannot be given here: an agent's turns end by a grammar of their own")
        if type(max_calls) is not int or max_calls < 0:
            raise InputError(f"max_calls is {max_calls!r}; expected a whole number, 0 or more", param="max_calls")
        adapter = model.params(**sampling).adapter
        if adapter is not None and adapter not in model.engine.adapters:
            raise InputError(f"there is no adapter {adapter!r}; load it first", param="adapter")
        self.model = model
        self.messages: list[Message] = list(read_messages(messages))
        """The conversation so far: what was asked, thought, called, found and answered."""
        self._sampling = sampling
        self._max_calls = max_calls
        self._approve = approve
        self._effort = effort
        self._under_way: weakref.ref[Answer] | None = None
        self._workshop = Workshop(model.settings)
        self._tools = _made(tools, self._workshop)
        self._open = partial(
            make_conversation,
            instructions=instructions,
            tools=merged(self._tools),
            current_date=current_date,
            output_schema=output_schema,
        )
        # What is wrong with these is better told now than when something is asked.
        opened = self._open(self.messages, effort)
        model.constraint(opened.messages)
        self._loop = _LoopThread()
        # At the end of the program too: sandboxes are processes.
        self._close = weakref.finalize(self, _close, self._loop, self._tools, self._workshop)
        try:
            self._run(self._workshop.start())
        except BaseException:
            self._close()
            raise

    def ask(self, message: Messages, *, effort: Effort | str | None = None) -> Answer:
        """Ask something; iterate over the result for the deltas, or `Answer.read` it.

        An answer that was read to its end becomes part of the conversation with its question. One that was closed or
        failed leaves none behind; so does one that is still under way when the next is asked, which ends it.
        Raises InputError for what cannot be used and ContextLengthError for what cannot fit.
        """
        if not self._close.alive:
            raise InputError("the agent is closed; make another one, with messages=agent.messages to go on")
        self._end_answer()
        asked = read_messages(message)
        answer = Answer(self, asked, self._open([*self.messages, *asked], effort or self._effort))
        self._under_way = weakref.ref(answer)
        return answer

    def close(self) -> None:
        """End an answer under way, the tools and what they hold. More than once is harmless."""
        self._end_answer()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end_answer(self) -> None:
        answer = self._under_way() if self._under_way is not None else None
        if answer is not None:
            answer.close()

    def _begin(self, conversation: Conversation, prompt: Sequence[int], num_calls: int, room: int | None) -> Generation:
        choice = AUTO if num_calls < self._max_calls else ToolChoice("none")
        constraint = self.model.constraint(conversation.messages, tool_choice=choice)
        sampling = {**self._sampling, "max_tokens": room, "constraint": constraint}
        try:
            return self.model.complete(prompt, **sampling)
        except ContextLengthError:
            if room is None:
                raise
            # It says how many there may be at most: as many as there is room for.
            return self.model.complete(prompt, **{**sampling, "max_tokens": None})

    def _is_approved(self, call: Message) -> bool:
        if self._approve is None:
            return True
        said = self._approve(call)
        if isinstance(said, Awaitable):
            asked = said

            async def answered() -> bool:
                return await asked

            said = self._run(answered())
        if not isinstance(said, bool):
            raise InputError(f"approve answered {said!r:.80}; expected True or False", param="approve")
        return said

    def _answer(self, call: Message) -> str:
        """What came of a call."""
        if not self._is_approved(call):
            return _DECLINED
        recipient = call.recipient or ""
        found = find(self._tools, recipient)
        if found is None:
            return f"Error: there is no tool {recipient!r}"
        tool, name = found
        return self._run(tool.run(name, call.text)).text

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(work)


class Answer(Iterator[Delta]):
    """One answer under way: an iterator of the deltas of all its generations, thoughts and calls included."""

    def __init__(self, agent: Agent, asked: Sequence[Message], conversation: Conversation) -> None:
        self.num_calls = 0
        self.num_tokens = 0
        """Calls that were run or declined, and tokens that were sampled."""
        self.finish_reason: FinishReason | None = None
        self._agent = agent
        self._asked = asked
        self._said: list[Message] = []
        self._conversation = conversation
        self._opening = render_for_completion([], agent.model.tokenizer)
        self._prompt = render_for_completion(conversation, agent.model.tokenizer, drop_analysis="past_turns")
        self._max_tokens = agent._sampling.get("max_tokens")
        self._generation: Generation | None = agent._begin(conversation, self._prompt, 0, self._max_tokens)

    def __next__(self) -> Delta:
        while self._generation is not None:
            try:
                delta = next(self._generation, None)
                if delta is not None:
                    return delta
                self._go_on(self._generation)
            except BaseException:
                self._end("error")
                raise
        raise StopIteration

    def read(self) -> str:
        """Read to the end; the final answer."""
        for _ in self:
            pass
        return self.text

    @property
    def messages(self) -> list[Message]:
        """What was said since the question, as far as it is complete: thoughts, calls, what they gave, the answer."""
        now = [] if self._generation is None else [one.message for one in self._generation.messages]
        return [*self._said, *now]

    @property
    def text(self) -> str:
        """The final answer as far as it is complete; iterate first."""
        return "".join(m.text for m in self.messages if m.role is Role.ASSISTANT and m.channel == Channel.FINAL)

    @property
    def reasoning(self) -> str:
        """The chain of thought as far as it is complete, not written for end users."""
        return "\n".join(
            m.text
            for m in self.messages
            if m.role is Role.ASSISTANT and m.channel == Channel.ANALYSIS and m.recipient is None
        )

    def close(self) -> None:
        """Stop here. What was asked and said becomes no part of the conversation."""
        if self.finish_reason is None:
            self._end("abort")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _go_on(self, done: Generation) -> None:
        """Behind a call: run it and let the model go on. Else the answer ends."""
        self.num_tokens += len(done.token_ids)
        said = done.messages
        call = _call(said) if done.finish_reason == "stop" else None
        if call is None:
            # A call that was cut off has no result.
            self._said += [one.message for one in said if one.recipient is None]
            self._generation = None
            self._finish(done.finish_reason or "stop")
            return
        result = self._agent._answer(call)
        self._said += [one.message for one in said]
        self._generation = None
        self.num_calls += 1
        self._prompt += done.token_ids
        try:
            self._read(call, result)
        except ContextLengthError:
            num_tokens = len(self._agent.model.tokenizer.encode(result))
            try:
                self._read(call, f"Error: the tool answered with {num_tokens} tokens, and there is no room for them.")
            except ContextLengthError:
                # A call without a result is none.
                self._said.pop()
                self._finish("length")

    def _read(self, call: Message, result: str) -> None:
        """Go on behind what a tool has answered. Raises ContextLengthError where it does not fit."""
        answer = tool_message(call.recipient or "", call.channel, result)
        prompt = [*self._prompt, *render_message(answer, self._agent.model.tokenizer), *self._opening]
        room = None if self._max_tokens is None else self._max_tokens - self.num_tokens
        generation = None
        if room is None or room > 0:
            generation = self._agent._begin(self._conversation, prompt, self.num_calls, room)
        self._said.append(answer)
        self._prompt, self._generation = prompt, generation
        if generation is None:
            self._finish("length")

    def _finish(self, reason: FinishReason) -> None:
        """The answer has come to its end, and is part of the conversation."""
        self._agent.messages += [*self._asked, *self._said]
        self._end(reason)

    def _end(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        if self._generation is not None:
            self._generation.close()
            self._said, self._generation = self.messages, None


class _LoopThread:
    """An event loop that tools run in. The caller's thread may have one that is running, as a notebook's has."""

    def __init__(self) -> None:
        self._is_ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        # A program that forgets to close it can end.
        self._thread = threading.Thread(target=self._main, name="ossia-tools", daemon=True)
        self._thread.start()
        self._is_ready.wait()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end; an exception here, such as Ctrl-C, cancels the work."""
        tasks: list[asyncio.Task[Any]] = []
        is_left = threading.Event()

        async def begin() -> T:
            task = asyncio.current_task()
            assert task is not None
            tasks.append(task)
            if is_left.is_set():
                task.cancel()
            return await work

        try:
            return asyncio.run_coroutine_threadsafe(begin(), self._loop).result()
        except BaseException:
            # Ctrl-C may come before there is a future to be cancelled, and while the work has begun.
            is_left.set()
            self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
            raise

    def close(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run what is the last, and end."""

        async def end() -> None:
            try:
                await last()
            finally:
                self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        # Garbage is collected in any thread.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _main(self) -> None:
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            self._is_ready.set()
            self._loop.run_forever()


def _made(tools: Sequence[str | Callable[..., Any] | Tool], workshop: Workshop) -> list[Tool]:
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise InputError(f"tools is {tools!r:.80}; expected a list of functions, names and tools", param="tools")
    made: list[Tool] = []
    functions = []
    for i, one in enumerate(tools):
        if isinstance(one, str):
            made.append(workshop.make(one))
        elif hasattr(one, "namespace") and hasattr(one, "run"):
            made.append(cast(Tool, one))
        elif callable(one):
            functions.append(one)
        else:
            raise InputError(
                f"tools[{i}] is {one!r:.80}; expected a function, the name of a tool or a Tool", param="tools"
            )
    return [*made, FunctionTools(functions)] if functions else made


def _call(said: Sequence[ParsedMessage]) -> Message | None:
    last = said[-1] if said else None
    return last.message if last is not None and last.stop == "<|call|>" and last.recipient is not None else None


def _close(loop: _LoopThread, tools: Sequence[Tool], workshop: Workshop) -> None:
    async def close() -> None:
        holding: list[Tool | Workshop] = [*tools, workshop]
        for held in holding:
            try:
                await held.close()
            except Exception:
                _log.exception("a tool could not be closed: %r", held)

    loop.close(close)
