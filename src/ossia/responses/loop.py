"""One response, start to end: render, generate, parse, run tools, go on - an iterator of events.

    run = Run(request, model, history)      whatever is wrong with the request is raised here
    async for event in run.events(): ...    or when the first event is asked for
    run.response, run.input, run.output     what there is to store

A call of a client's function ends the turn; the next request's prompt then begins with exactly the tokens that were
read and sampled here. A tool that ossia runs is answered on the spot, and only the answer is new to the engine.
Errors after the first event end the response as failed; leaving the iterator frees the engine's sequence.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from ossia.engine.request import NO_TOKEN, Constraint, SamplingParams, TokenOutput
from ossia.errors import ContextLengthError, InputError, OssiaError
from ossia.harmony import Channel, Delta, Header, ParsedMessage, Role, StreamParser, Tokenizer, tool_message
from ossia.responses.builder import Builder
from ossia.responses.client_tools import is_call
from ossia.responses.constrain import FORMAT_PARAM, Turn
from ossia.responses.convert import (
    Entry,
    History,
    Prompt,
    Reader,
    Spoken,
    Summary,
    TurnMemory,
    left_behind,
    sealed_reasoning,
    uncovered,
)
from ossia.responses.events import Event
from ossia.responses.include import shown
from ossia.responses.schema import (
    Json,
    PromptRequest,
    Reasoning,
    ResponseRequest,
    Usage,
    check_request,
    configured,
    new_response,
)
from ossia.responses.seal import Seal
from ossia.responses.tools import (
    Choice,
    Toolbox,
    ToolResult,
    Tools,
    read_tool_choice,
    read_tools,
    with_found,
    without_secrets,
)

_log = logging.getLogger(__name__)

# A prompt that was shortened leaves at least this much room for the answer.
_MIN_ROOM_TOKENS = 512
# Calls of tools that nobody declared, before the response ends without more.
_MAX_UNKNOWN_CALLS = 3
# Calls that were refused - too many, too late, too often the same - before the response ends without more.
_MAX_REFUSED_CALLS = 1
# Times that the same call may fail.
_MAX_SAME_FAILURES = 3
# Times that the same call gives the same answer: before the model is told so, and before it is not made again.
_MANY_SAME_ANSWERS, _MAX_SAME_ANSWERS = 3, 8
# Each view of the browser has a number of its own, also where it shows the same.
_CURSOR = re.compile(r"\A\[\d+\] ")
_ANSWER_NOW = "Give your final answer now."


class TokenSource(Protocol):
    """What the loop needs of an engine; `ossia.engine.AsyncEngine` is one."""

    def check(self, token_ids: Sequence[int], params: SamplingParams) -> int:
        """The most tokens that the answer may have; in any thread. Raises InputError and ContextLengthError."""

    def generate(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenOutput, None]:
        """Tokens of one answer. Raises what `check` raises at once, other errors when iterated."""


def unconstrained(_turn: Turn) -> Constraint | None:
    return None


def _today() -> str:
    return datetime.date.today().isoformat()


@dataclass(frozen=True)
class Budget:
    """What the tools of one response may take, all calls together; 0 for no bound.

    What comes after that is refused with a word to the model, which then has one more turn for its answer.
    """

    max_calls: int = 128
    # From the beginning of the response; a call that is under way then is stopped.
    max_s: float = 1800.0
    # Of what the tools answer.
    max_tokens: int = 0


@dataclass(frozen=True)
class Model:
    """A model that answers, and what answering takes."""

    name: str
    engine: TokenSource
    tokenizer: Tokenizer
    seal: Seal = field(default_factory=Seal.ephemeral)
    memory: TurnMemory = field(default_factory=TurnMemory)
    # The constraint of one turn; called anew for each, since a constraint has a state.
    constrain: Callable[[Turn], Constraint | None] = unconstrained
    # Tools that ossia runs, made anew for each response.
    toolbox: Callable[[], Toolbox | None] = lambda: None
    budget: Budget = field(default_factory=Budget)
    # The date that the model is told, YYYY-MM-DD.
    today: Callable[[], str] = _today
    # How to sample where a request does not say: fields of SamplingParams.
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def sampled(self, **asked: float | None) -> dict[str, Any]:
        """How to sample for a request that has asked for this; None where it has not."""
        return {**self.sampling, **{name: value for name, value in asked.items() if value is not None}}


@dataclass(frozen=True)
class Extras:
    """What Chat Completions and others know beside the fields of a Responses request."""

    # Fields of SamplingParams.
    sampling: Mapping[str, Any] = field(default_factory=dict)
    # Texts that end the final answer.
    stops: tuple[str, ...] = ()


class Phase(NamedTuple):
    """A part of the time that a response took, in nanoseconds since the epoch: queue, prefill, decode or tool."""

    name: str
    begin_ns: int
    end_ns: int
    fields: Mapping[str, str | int] = {}


def engine_phases(begin_ns: int, first_ns: int, num_prompt: int, num_cached: int, num_sampled: int) -> list[Phase]:
    """Where the time of a generation that ends now went; ``first_ns`` is 0 if no token came."""
    now_ns = time.time_ns()
    read = {"prompt_tokens": num_prompt, "cached_tokens": num_cached}
    phases = [Phase("prefill", begin_ns, first_ns or now_ns, read)]
    if first_ns:
        phases.append(Phase("decode", first_ns, now_ns, {"output_tokens": num_sampled}))
    return phases


class Run:
    """One response being made. Its attributes are complete when `events` has ended."""

    def __init__(
        self,
        request: ResponseRequest,
        model: Model,
        history: History | None = None,
        *,
        references: Mapping[str, Entry] | None = None,
        extras: Extras | None = None,
        toolbox: Toolbox | None = None,
        owner: str = "",
    ) -> None:
        """``toolbox`` stands in for the model's own; ``owner`` is whose response it is, for those who keep it.

        Raises InputError, or NotFoundError for an item that is not there, naming what is wrong.
        """
        check_request(request)
        self.history = history or History()
        self.input: list[Entry] = []
        self.output: list[Entry] = []
        self.error: OssiaError | None = None
        self.owner = owner
        self.phases: list[Phase] = []
        self._model = model
        self.toolbox = toolbox if toolbox is not None else model.toolbox()
        prepared = prepare(request, model, self.history, references, self.toolbox)
        request = self.request = prepared.request
        self.tools, self._format = prepared.tools.settled(), request.format
        self.input, self.current_date = prepared.entries, prepared.current_date
        self._choice, self._prompt = prepared.choice, prepared.prompt
        sampled = model.sampled(temperature=request.temperature, top_p=request.top_p)
        self.response = new_response(request, model.name, sampled)
        self.response["input_transformations"] = self.history.transformations
        self._extras = extras or Extras()
        self._builder = Builder(self.response, self.tools, toolbox=self.toolbox, stops=self._extras.stops)
        self._params = SamplingParams(
            **{
                **sampled,
                "logprobs": request.wants_logprobs,
                "top_logprobs": request.top_logprobs or 0,
                "max_tokens": request.max_output_tokens,
                **self._extras.sampling,
            }
        )
        self._usage = Usage()
        # What of it a summary took.
        self._summary_usage = Usage()
        # What the last thought took, as its item keeps it.
        self._thought: Json = {}
        self._num_tool_calls = 0
        # Turns that a summary made here knows nothing of.
        self.num_left_out = 0
        self._num_unknown_calls = 0
        self._num_refused_calls = 0
        self._num_answer_tokens = 0
        self._failures: Counter[tuple[str, str]] = Counter()
        # By call: what it has answered, and how often.
        self._answers: dict[tuple[str, str], Counter[int]] = {}
        self._began_s = time.monotonic()
        if self.toolbox is not None:
            self.toolbox.begin(self.response["id"])
        asked = [entry.item.get("type") for entry in self.input]
        if "compaction_trigger" in asked[:-1]:
            raise InputError("a compaction_trigger is not the last item of the input; move it there", param="input")
        self._is_compaction = asked[-1:] == ["compaction_trigger"]
        threshold = request.compact_threshold
        self._is_long = threshold is not None and self.num_prompt_tokens > threshold
        # Fails here, before anything is sent, if the prompt cannot fit or a schema cannot be enforced.
        if not (self._is_compaction or self._is_long):
            self._fit(self._params)
        self._constraint = self._first_constraint(prepared.tools)
        self.response["tools"] = self._echoed_tools()
        # All that was said since the input, as the next prompt repeats it.
        self._turn: list[Spoken] = []

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._prompt.token_ids)

    @property
    def usage(self) -> Usage:
        return self._usage

    @property
    def _answer_usage(self) -> Usage:
        """All but a summary, which the request's limits do not count."""
        return Usage(*(whole - part for whole, part in zip(self._usage, self._summary_usage, strict=True)))

    @property
    def stopped(self) -> str | None:
        """The stop text that ended the answer."""
        return self._builder.stopped

    @property
    def is_pending(self) -> bool:
        """Whether the turn waits for a tool's answer."""
        last = self.output[-1].item if self.output else {}
        kind = last.get("type")
        return kind == "mcp_approval_request" or is_call(kind)

    async def events(self, slot: AbstractAsyncContextManager[Any] | None = None) -> AsyncGenerator[Event, None]:
        """Make the response. A background response is queued until ``slot`` is entered."""
        for event in self._builder.begin():
            yield event
        try:
            if slot is None:
                for event in self._builder.run():
                    yield event
                async with aclosing(self._generations()) as made:
                    async for event in made:
                        yield event
            else:
                queued_ns = time.time_ns()
                async with slot, aclosing(self._generations()) as made:
                    self.phases.append(Phase("queue", queued_ns, time.time_ns()))
                    for event in self._builder.run():
                        yield event
                    async for event in made:
                        yield event
        except OssiaError as error:
            self.error = error
        # A fault of ours must still end the stream in a way that clients understand.
        except Exception:
            _log.exception("response=%s failed", self.response["id"])
            self.error = OssiaError("the server met an error of its own; its log tells more")
        # One that could not be kept has been told as failed already, by `fail`.
        if self.error is not None and self.response["status"] in ("queued", "in_progress"):
            for event in self._builder.end("failed", self._usage, error=self.error):
                yield event

    def cancel(self) -> list[Event]:
        """The events that end a response whose iterator was left."""
        return self._builder.end("cancelled", self._usage)

    def fail(self, error: OssiaError) -> Event:
        """The event in place of the last one, for a response that has ended and could not be kept."""
        self.error = error
        return self._builder.fail(error)

    def _echoed_tools(self) -> list[Json]:
        """The tools as the response shows them: those that are offered here, functions strict or not as they are."""
        strict = {function.param: function.strict for function in self.tools.functions}

        def settled(tool: Json, param: str) -> Json:
            if tool.get("type") == "namespace":
                inner = [settled(one, f"{param}.tools[{k}]") for k, one in enumerate(tool["tools"])]
                return {**tool, "tools": inner}
            is_function = tool.get("type") == "function"
            return {**tool, "strict": strict.get(param, tool.get("strict"))} if is_function else tool

        shown = []
        for i, tool in enumerate(self.response["tools"]):
            tool = settled(tool, f"tools[{i}]")
            if tool["type"] not in self.tools.ignored:
                shown.append(without_secrets(tool))
        return shown

    # The loop --------------------------------------------------------------------------------------------------------

    async def _generations(self) -> AsyncGenerator[Event, None]:
        if self._is_compaction or self._is_long:
            async with aclosing(self._compact()) as made:
                async for event in made:
                    yield event
        if self.request.prewarms:
            await self._prewarm()
        if self._is_compaction or self.request.prewarms:
            for event in self._builder.end("completed", self._usage):
                yield event
            return
        self._began_s = time.monotonic()
        for item in self.toolbox.opening() if self.toolbox is not None else ():
            for event in self._builder.listed(item):
                yield event
            self.output.append(Entry(item))
        async with aclosing(self._approved()) as made:
            async for event in made:
                yield event
        while True:
            generation = _Generation(self._model.tokenizer, self._prompt)
            async with aclosing(self._generate(generation)) as made:
                async for event in made:
                    yield event
            call = generation.call
            self._prompt.extend(generation.sampled)
            if call is None or self._builder.function is not None or self._builder.item["type"] == _ASKS:
                break
            async with aclosing(self._answer(call)) as answered:
                async for event in answered:
                    yield event
            limit = self._params.max_tokens
            generation.is_cut = limit is not None and self._answer_usage.output_tokens >= limit
            if generation.is_cut or self._num_unknown_calls > _MAX_UNKNOWN_CALLS or self._is_refused_for_good:
                break
        if generation.is_cut:
            ended = self._builder.end("incomplete", self._usage, reason="max_output_tokens")
        elif self._is_refused_for_good:
            ended = self._builder.end("incomplete", self._usage, reason="max_messages")
        else:
            ended = self._builder.end("completed", self._usage)
        for event in ended:
            yield event

    async def _compact(self) -> AsyncGenerator[Event, None]:
        """Sum up all that was said, and go on from there."""
        for event in self._builder.compacting():
            yield event
        entries = [*self.history.entries, *self.input]
        text, used, self.num_left_out = await summarize(self._model, entries)
        self._usage = Usage(*map(sum, zip(self._usage, used, strict=True)))
        self._summary_usage = used
        said = [one.message.text for entry in entries for one in entry.spoken if one.message.role is Role.USER]
        summary = Summary(text, said[-1] if said else "", covers=True)
        for event in self._builder.compacted(summary.sealed(self._model.seal)):
            yield event
        entry = Entry(self._builder.item, summary.spoken())
        self.output.append(entry)
        self._prompt = Prompt(self.request, [entry], self.tools, self._model.tokenizer, self.current_date)

    async def _prewarm(self) -> None:
        """Read the prompt, so that the next request finds it in the cache."""
        token_ids, num_cached = self._prompt.token_ids, 0
        async with aclosing(self._model.engine.generate(token_ids, replace(self._params, max_tokens=1))) as source:
            async for output in source:
                num_cached = output.num_cached_tokens
        used = self._usage
        self._usage = used._replace(
            input_tokens=used.input_tokens + len(token_ids), cached_tokens=used.cached_tokens + num_cached
        )

    async def _generate(self, generation: _Generation) -> AsyncGenerator[Event, None]:
        """One generation of the engine, to its end or to a call."""
        used = self._usage
        params = self._params
        if params.max_tokens is not None:
            params = replace(params, max_tokens=params.max_tokens - self._answer_usage.output_tokens)
        params = self._fit(params)
        token_ids = self._prompt.token_ids
        constraint = self._constraint or self._constrain()
        self._constraint = None
        params = replace(params, constraint=constraint)
        num_cached = 0
        begin_ns, first_ns = time.time_ns(), 0
        try:
            async with aclosing(self._model.engine.generate(token_ids, params)) as source:
                async for output in source:
                    if not first_ns:
                        first_ns = time.time_ns()
                    if output.token_id != NO_TOKEN:
                        for event in self._take(generation, output):
                            yield event
                    num_cached = output.num_cached_tokens
                    if output.finish_reason is not None or generation.call or self._builder.stopped is not None:
                        generation.is_cut = output.finish_reason == "length" and generation.call is None
                        break
        finally:
            self.phases += engine_phases(begin_ns, first_ns, len(token_ids), num_cached, len(generation.sampled))
            # Whoever leaves leaves a thought open.
            is_thinking = self._builder.is_open and self._builder.item["type"] == "reasoning"
            num_open = generation.num_open_tokens if is_thinking else 0
            self._usage = Usage(
                used.input_tokens + len(token_ids),
                used.cached_tokens + num_cached,
                used.output_tokens + len(generation.sampled),
                used.reasoning_tokens + generation.num_reasoning_tokens + num_open,
            )
        # Behind a call nothing counts.
        for parsed in generation.parser.close(cut=generation.is_cut) if generation.call is None else ():
            for event in self._tell(generation, parsed, is_whole=not generation.is_cut):
                yield event
        self._usage = self._usage._replace(reasoning_tokens=used.reasoning_tokens + generation.num_reasoning_tokens)

    def _take(self, generation: _Generation, output: TokenOutput) -> Iterable[Event]:
        """The events of one token."""
        generation.sampled.append(output.token_id)
        parsed_events = generation.parser.feed(output.token_id)
        if output.logprob is None and len(parsed_events) == 1 and type(parsed_events[0]) is Delta:
            return self._builder.delta(parsed_events[0].text)
        return list(self._take_all(generation, output, parsed_events))

    def _take_all(
        self, generation: _Generation, output: TokenOutput, parsed_events: Sequence[object]
    ) -> Iterator[Event]:
        logprobs = []
        if output.logprob is not None and output.token_id not in self._model.tokenizer.special_ids:
            logprobs = [_logprob(self._model.tokenizer, output)]
        if logprobs and not any(type(parsed) is Delta for parsed in parsed_events):
            # Half a character: told with the rest of it.
            if generation.parser.header is not None:
                self._builder.delta("", logprobs)
            logprobs = []
        for parsed in parsed_events:
            if type(parsed) is Delta:
                yield from self._builder.delta(parsed.text, logprobs)
                logprobs = []
            else:
                yield from self._tell(generation, parsed, is_whole=True)

    def _tell(self, generation: _Generation, parsed: object, *, is_whole: bool) -> Iterator[Event]:
        if isinstance(parsed, Header):
            generation.opened_s = time.monotonic()
            yield from self._builder.open(parsed)
        elif isinstance(parsed, Delta):
            yield from self._builder.delta(parsed.text)
        elif isinstance(parsed, ParsedMessage):
            spoken = generation.spoken(parsed, is_whole=is_whole)
            kept: Json = {}
            if self._builder.item["type"] == "reasoning":
                generation.num_reasoning_tokens += len(parsed.token_ids)
                seconds = round(time.monotonic() - generation.opened_s, 3)
                kept = self._thought = {"usage": {"reasoning_tokens": len(parsed.token_ids), "seconds": seconds}}
            fields = self._included(kept)
            if self._builder.is_call(_header(parsed)):
                if is_whole:
                    yield from self._called(generation, parsed, spoken)
                elif events := self._builder.close("incomplete", fields=fields):
                    # Half a call is shown, and not said again.
                    yield from events
                    self.output.append(Entry({**self._builder.item, **kept}))
                return
            if self._builder.item["type"] == "reasoning" and _SEALED in (self.request.include or ()):
                fields["encrypted_content"] = sealed_reasoning(spoken, self._model.seal)
            yield from self._builder.close("completed" if is_whole else "incomplete", fields=fields)
            self._turn.append(spoken)
            self.output.append(Entry({**self._builder.item, **kept}, (spoken,)))

    def _called(self, generation: _Generation, parsed: ParsedMessage, spoken: Spoken) -> Iterator[Event]:
        """A call is complete: a client's ends the turn, ours stays open until it is answered."""
        generation.call = parsed
        self._turn.append(spoken)
        asks = self._builder.item["type"] == _ASKS
        if self._builder.function is None and not asks:
            return
        fields: Json = {}
        if self.toolbox is not None:
            if asks:
                fields = self.toolbox.ask(parsed.message)
            elif self.toolbox.wants_approval:
                fields = {"requires_approval": True}
        yield from self._builder.close(fields=fields)
        item = self._builder.item
        self.output.append(Entry(item, (spoken,)))
        self._model.memory.keep(item["id"] if asks else item["call_id"], tuple(self._turn))

    async def _answer(self, call: ParsedMessage) -> AsyncGenerator[Event, None]:
        """Run a tool of ours and give its answer to the model."""
        recipient = call.recipient or ""
        fields: Json = {}
        is_failed = True
        is_known = self._builder.item["type"] != "reasoning"
        if not is_known:
            self._num_unknown_calls += 1
            names = self.tools.names
            known = f"The tools are: {', '.join(names)}." if names else "There are no tools; answer without."
            text = f"Unknown tool: {recipient}. {known}"
            fields = self._thought
        else:
            assert self.toolbox is not None
            for event in self._builder.begin_tool():
                yield event
            self._num_tool_calls += 1
            recipient = self.toolbox.name(recipient)
            same = (recipient, call.message.text)
            if refusal := self._refusal(same):
                self._num_refused_calls += 1
                text = refusal
            else:
                text, fields, is_failed = await self._within_time(recipient, self.toolbox.run(call.message))
                if is_failed:
                    self._failures[same] += 1
                    if self._failures[same] == _MAX_SAME_FAILURES:
                        text += f"\n[This call has failed {_MAX_SAME_FAILURES} times; do not make it again.]"
                else:
                    text += self._repeated(same, text)
        told = self._included(fields)
        ended = self._builder.end_tool(told, is_failed=is_failed) if is_known else self._builder.close(fields=told)
        for event in ended:
            yield event
        self._answered(self._turn[-1], recipient, call.channel, text, fields)

    async def _approved(self) -> AsyncGenerator[Event, None]:
        """Run the calls that the input approves; those that it does not are answered where they stand."""
        entries = [*self.history.entries, *self.input]
        asked = {entry.item["id"]: entry for entry in entries if entry.item.get("type") == _ASKS}
        for entry in self.input:
            if entry.item.get("type") != "mcp_approval_response" or not entry.item["approve"]:
                continue
            request = asked[entry.item["approval_request_id"]]
            for event in self._builder.open_approved(request.item):
                yield event
            for event in self._builder.begin_tool():
                yield event
            self._num_tool_calls += 1
            recipient = f"{request.item['server_label']}.{request.item['name']}"
            channel: str | None = str(Channel.COMMENTARY)
            if request.spoken:
                called = request.spoken[-1].message
                recipient, channel = called.recipient or recipient, called.channel
            if self.toolbox is None:
                gone = "Error: the server's tools are not offered any more."
                text, fields, is_failed = ToolResult(gone, {}, True)
            else:
                approved = self.toolbox.run_approved(request.item)
                text, fields, is_failed = await self._within_time(recipient, approved)
            for event in self._builder.end_tool(self._included(fields), is_failed=is_failed):
                yield event
            self._answered(None, recipient, channel, text, fields)

    async def _within_time(self, recipient: str, work: Coroutine[Any, Any, ToolResult]) -> ToolResult:
        """What a tool says, stopped when the time of the response is over; its faults are words too."""
        begin_ns = time.time_ns()
        max_s = self._model.budget.max_s
        left_s = max(max_s - (time.monotonic() - self._began_s), 0.0) if max_s else None
        try:
            async with asyncio.timeout(left_s) as limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            return ToolResult(f"[ERROR] The time for tools is used up; the call was stopped. {_ANSWER_NOW}", {}, True)
        except OssiaError:
            # A call that cannot be logged must not go on unseen.
            raise
        except Exception:
            _log.exception("response=%s tool=%s failed", self.response["id"], recipient)
            return ToolResult("[ERROR] The tool met an error of its own.", {}, True)
        finally:
            self.phases.append(Phase("tool", begin_ns, time.time_ns(), {"tool": recipient}))

    def _included(self, fields: Json) -> Json:
        """Of what the open item keeps, what the request includes."""
        return shown({"type": self._builder.item["type"], **fields}, self.request.include or ())

    def _answered(self, call: Spoken | None, recipient: str, channel: str | None, text: str, fields: Json) -> None:
        """Say the answer of a tool behind its call, as far as it fits."""
        answer = tool_message(recipient, channel, text)
        num_tokens = self._prompt.extend_answer(answer)
        if self.request.truncation != "auto" and not self._has_room():
            self._prompt.drop_last()
            answer = tool_message(
                recipient,
                channel,
                f"[ERROR] The tool answered with {num_tokens} tokens, and there is no room for them any more. "
                f"Ask for less. {_ANSWER_NOW}",
            )
            num_tokens = self._prompt.extend_answer(answer)
        self._num_answer_tokens += num_tokens
        said = Spoken(answer)
        self._turn.append(said)
        self.output.append(Entry({**self._builder.item, **fields}, (call, said) if call is not None else (said,)))

    def _has_room(self) -> bool:
        room = min(self._params.max_tokens or _MIN_ROOM_TOKENS, _MIN_ROOM_TOKENS)
        try:
            self._model.engine.check(self._prompt.token_ids, replace(self._params, max_tokens=room))
        except ContextLengthError:
            return False
        return True

    def _refusal(self, same: tuple[str, str]) -> str | None:
        """Why the next call is not run; None if it is."""
        budget = self._model.budget
        limits = [limit for limit in (self.request.max_tool_calls, budget.max_calls or None) if limit is not None]
        if self._num_tool_calls > min(limits, default=self._num_tool_calls):
            return f"No more tool calls are allowed in this response. {_ANSWER_NOW}"
        if budget.max_s and time.monotonic() - self._began_s >= budget.max_s:
            return f"The time for tools is used up. {_ANSWER_NOW}"
        if budget.max_tokens and self._num_answer_tokens >= budget.max_tokens:
            return f"The tools have answered with as many tokens as they may. {_ANSWER_NOW}"
        if self._failures[same] >= _MAX_SAME_FAILURES:
            return f"The same call has failed {_MAX_SAME_FAILURES} times and was not made again. {_ANSWER_NOW}"
        if max(self._answers.get(same, Counter()).values(), default=0) >= _MAX_SAME_ANSWERS:
            return f"The same call has given the same answer {_MAX_SAME_ANSWERS} times. {_ANSWER_NOW}"
        return None

    def _repeated(self, same: tuple[str, str], text: str) -> str:
        """What the model is told of a call that it has made before, with the same answer."""
        answers = self._answers.setdefault(same, Counter())
        answer = hash(_CURSOR.sub("", text))
        answers[answer] += 1
        if answers[answer] < _MANY_SAME_ANSWERS:
            return ""
        return f"\n[This call has given the same answer {answers[answer]} times; go on with what you have.]"

    @property
    def _is_refused_for_good(self) -> bool:
        return self._num_refused_calls > _MAX_REFUSED_CALLS

    def _first_constraint(self, asked: Tools) -> Constraint | None:
        """The constraint of the first generation. What cannot be enforced, and nobody has asked for, gives way: of
        functions and a format that do not say whether they are strict the one at fault, or all functions that are too
        much together."""
        open_params = {function.param for function in asked.callable if function.strict is None}
        loose: set[str] = set()
        while True:
            try:
                return self._constrain()
            except InputError as error:
                if error.param in open_params - loose:
                    loose.add(error.param)
                elif error.param == "tools" and open_params - loose:
                    loose |= open_params
                elif error.param == FORMAT_PARAM and self.request.format.strict is None and self._format.is_strict:
                    self._format = self._format.loosened()
                    self.response["text"]["format"]["strict"] = False
                else:
                    raise
                self.tools = asked.settled(loose)

    def _constrain(self) -> Constraint | None:
        """A fresh constraint for the next generation."""
        choice = self._choice
        if self._num_tool_calls and choice.mode == "required":
            # What had to be called has been; what may be called stays.
            asked = self.request.tool_choice
            is_list = isinstance(asked, dict) and asked["type"] == "allowed_tools"
            choice = Choice("auto", choice.recipients if is_list else None)
        cap = self.request.max_reasoning_tokens
        left = None if cap is None else max(cap - self._answer_usage.reasoning_tokens, 0)
        return self._model.constrain(Turn(self.tools, choice, self._format, left))

    def _fit(self, params: SamplingParams) -> SamplingParams:
        """Parameters with which the prompt fits, the prompt shortened if need be and if the request allows it.

        An answer that may be longer than there is room for gets the room there is.
        """
        engine = self._model.engine
        room = min(params.max_tokens or _MIN_ROOM_TOKENS, _MIN_ROOM_TOKENS)
        as_fits = replace(params, max_tokens=None)

        def fits(token_ids: list[int]) -> bool:
            try:
                engine.check(token_ids, replace(params, max_tokens=room))
            except ContextLengthError:
                return False
            return True

        token_ids = self._prompt.token_ids
        try:
            engine.check(token_ids, params)
            return params
        except ContextLengthError as error:
            if self.request.truncation == "auto" and not fits(token_ids):
                if self._prompt.shorten_until(fits):
                    return as_fits if params.max_tokens is None or params.max_tokens > room else params
                raise ContextLengthError(
                    f"{error.message}; the last turn alone is too long: shorten it", param="input"
                ) from None
            try:
                engine.check(token_ids, as_fits)
                return as_fits
            except ContextLengthError:
                advice = "shorten the input, or leave out its oldest turns, as truncation 'auto' of Responses does"
                raise ContextLengthError(f"{error.message}; {advice}", param="input") from None


_ASKS = "mcp_approval_request"
_SEALED = "reasoning.encrypted_content"


class _Generation:
    """One run of the engine within a response."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt) -> None:
        self.parser = StreamParser(tokenizer)
        self.sampled: list[int] = []
        self.call: ParsedMessage | None = None
        # Ended by its length.
        self.is_cut = False
        self.num_reasoning_tokens = 0
        # When the message under way had its header.
        self.opened_s = 0.0
        self._opening = prompt.opening
        self._end = tokenizer.special("<|end|>")

    @property
    def num_open_tokens(self) -> int:
        """Tokens of the message that has not ended."""
        return len(self.sampled) - sum(len(parsed.token_ids) for parsed in self.parser.messages)

    def spoken(self, parsed: ParsedMessage, *, is_whole: bool) -> Spoken:
        """The message with its tokens as a later prompt repeats them; half a message is rendered anew, with an end."""
        if not is_whole or parsed.stop is None:
            return Spoken(parsed.message)
        token_ids = (self._opening if parsed.start == 0 else ()) + parsed.token_ids
        if parsed.stop in ("<|return|>", "<|endoftext|>"):
            token_ids = (*token_ids[:-1], self._end)
        return Spoken(parsed.message, token_ids)


class Prepared(NamedTuple):
    """What a request says."""

    # Under what the conversation configures.
    request: Any
    tools: Tools
    choice: Choice
    # Of its input.
    entries: list[Entry]
    # As the model is told.
    current_date: str
    prompt: Prompt


def prepare(
    request: PromptRequest,
    model: Model,
    history: History,
    references: Mapping[str, Entry] | None = None,
    toolbox: Toolbox | None = None,
) -> Prepared:
    """Read a request after its history. Raises InputError naming what is wrong."""
    request = configured(request, [*(entry.item for entry in history.entries), *_objects(request.input_items)])
    check_request(request)
    tools = read_tools(request.tools or (), toolbox)
    entries = Reader(history, model.seal, model.memory, references or {}).read(request.input_items)
    tools = with_found(tools, [entry.item for entry in (*history.entries, *entries)])
    choice = read_tool_choice(request.tool_choice, tools)
    current_date = history.current_date or model.today()
    history.transformations += left_behind(request, entries)
    said = uncovered([*history.entries, *entries], model.seal)
    prompt = Prompt(request, said, tools, model.tokenizer, current_date)
    return Prepared(request, tools, choice, entries, current_date, prompt)


def _objects(items: Sequence[object]) -> list[Json]:
    return [item for item in items if isinstance(item, dict)]


_SUMMARIZE = (
    "Write a summary of this conversation that lets another assistant go on with it: what was asked, what was found "
    "and decided, what was done with which result, names and numbers that matter, and what is still to do. Write only "
    "the summary."
)
_MAX_SUMMARY_TOKENS, _MAX_SUMMARY_THOUGHTS = 4_096, 1_024


class Summed(NamedTuple):
    """What was said, summed up, and how many of its oldest turns there was no room for."""

    text: str
    usage: Usage
    num_left_out: int


async def summarize(model: Model, entries: Sequence[Entry]) -> Summed:
    """What was said, summed up by the model itself. Raises OssiaError if it wrote nothing."""
    request = ResponseRequest(
        input=[{"type": "message", "role": "user", "content": _SUMMARIZE}],
        reasoning=Reasoning(effort="low", max_tokens=_MAX_SUMMARY_THOUGHTS),
        max_output_tokens=_MAX_SUMMARY_TOKENS,
        truncation="auto",
        store=False,
    )
    # Takes as long as the conversation is, which is long.
    run = await asyncio.to_thread(Run, request, model, History(list(entries)))
    response = await finish(run)
    said = [item for item in response["output"] if item["type"] == "message" and item["phase"] == "final_answer"]
    text = "".join(part["text"] for item in said for part in item["content"])
    if not text.strip():
        raise OssiaError("the model wrote no summary of the conversation; send a shorter one")
    return Summed(text, run.usage, run._prompt.num_left_out)


async def finish(run: Run) -> Json:
    """The response when it is done, for callers that do not stream. Raises what made it fail."""
    async with aclosing(run.events()) as events:
        async for _ in events:
            pass
    if run.error is not None:
        raise run.error
    return run.response


def _header(parsed: ParsedMessage) -> Header:
    return Header(parsed.role, parsed.name, parsed.channel, parsed.recipient, parsed.content_type)


def _logprob(tokenizer: Tokenizer, output: TokenOutput) -> Json:
    def one(token_id: int, logprob: float | None) -> Json:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": logprob}

    top = [one(token_id, logprob) for token_id, logprob in output.top_logprobs]
    return {**one(output.token_id, output.logprob), "top_logprobs": top}
