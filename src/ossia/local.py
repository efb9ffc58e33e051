"""A checkpoint opened for use from Python: messages in, deltas out.

model = ossia.load("gpt-oss-20b")
for delta in model.generate("Why is the sky blue?", effort="low"):
    print(delta.text, end="")
"""

from __future__ import annotations

import datetime
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ossia import ops as backends
from ossia.config import EMBEDDED, Config, from_arguments
from ossia.engine import Engine, EngineConfig, FinishReason, Runner, SamplingParams, TokenOutput
from ossia.engine.request import Constraint
from ossia.engine.stops import TextStops
from ossia.errors import ConfigError, InputError, OssiaError, UnavailableError
from ossia.harmony import (
    Channel,
    Conversation,
    Delta,
    DeveloperContent,
    Effort,
    Event,
    Header,
    Message,
    ParsedMessage,
    ResponseFormat,
    Role,
    StreamParser,
    SystemContent,
    Tokenizer,
    ToolDescription,
    ToolNamespace,
    render_for_completion,
)
from ossia.harmony.grammar import AUTO, TRAINED_NAMESPACES, ToolChoice, declared_grammar
from ossia.model.adapted import check_base_copies
from ossia.model.adapter import Adapter, read_adapter
from ossia.model.config import ModelConfig
from ossia.model.hub import downloaded, resolve_model
from ossia.model.memory import MXFP4_EXPERTS, HeldBytes, available_bytes, own_bytes, weight_bytes
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import AdapterOps

if TYPE_CHECKING:
    from ossia.engine.masks import GrammarCompiler
    from ossia.engine.parallel import TeamRunner

_log = logging.getLogger(__name__)

# Of `SamplingParams`; what an engine reports besides tokens, `Generation` has no place for.
_PARAMETERS = tuple(
    field.name
    for field in fields(SamplingParams)
    if field.name not in ("logprobs", "top_logprobs", "score_from", "drawn_logprobs", "routing")
)

Messages = str | Message | Conversation | Sequence[Message | Mapping[str, Any]]
"""One user message as text, or a conversation; messages as dicts take the form of `ossia.harmony.messages`."""


def load(model: str | Path = EMBEDDED, **settings: Any) -> LocalModel:
    """Open a checkpoint: a folder, a .gguf file, or a name such as "gpt-oss-20b" that `ossia pull` has fetched.

    ``settings`` are fields of `ossia.config.Config`: backend, threads, dense, kv, kv_memory (such as "2GiB"),
    max_context, adapters (paths by name). Neither the settings file nor OSSIA_* variables are read.
    Raises NotFoundError, CheckpointError or ConfigError, each saying what to do.
    """
    return LocalModel.open(from_arguments(settings | {"model": str(model)}))


class LocalModel:
    """An opened checkpoint with its engine. Several answers may be under way at once, in several threads too: these
    take turns, and an answer is read by one of them."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, checkpoint: Checkpoint, settings: Config | None = None
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        self.settings = settings or Config()
        """What it was opened with."""
        self.sampling: Mapping[str, Any] = checkpoint.sampling()
        """How an answer is sampled that does not say otherwise: what the checkpoint names of `SamplingParams`."""
        self._outputs: dict[int, deque[TokenOutput]] = {}
        # The engine is one thread's at a time.
        self._lock = threading.RLock()
        # Requests of answers that nobody holds any more.
        self._dropped: deque[int] = deque()

    @classmethod
    def open(cls, config: Config) -> LocalModel:
        """Open what the settings name; see `load`."""
        checkpoint = _open_checkpoint(config)
        ops = backends.load(config.backend, **backend_options(config))
        _check_first(config)
        tokenizer = checkpoint.tokenizer()
        runner = make_runner(config, ops, checkpoint, _engine_options(config))
        model = cls(Engine(runner, token_bytes=tokenizer.token_bytes), tokenizer, checkpoint, config)
        for name, path in config.adapters.items():
            model.load_adapter(path, name)
        return model

    def read_adapter(self, path: str | Path, name: str | None = None) -> Adapter:
        """A LoRA adapter of this model from the folder that PEFT or ossia wrote; its name is the folder's by default.

        Raises NotFoundError and CheckpointError, saying what is wrong with it.
        """
        adapter = read_adapter(Path(os.path.expanduser(path)), self.checkpoint.config, name)
        check_base_copies(adapter, self.checkpoint)
        return adapter

    def load_adapter(self, path: str | Path, name: str | None = None) -> str:
        """Read a LoRA adapter and return its name, to be given as ``adapter`` to `generate`.

        One of the same name is replaced; answers under way stay with the one they began with. Raises what
        `read_adapter` raises, and ConfigError where it does not fit the memory for adapters.
        """
        adapter = self.read_adapter(path, name)
        with self._lock:
            self.engine.load_adapter(adapter)
        return adapter.name

    def unload_adapter(self, name: str) -> None:
        """Let go of an adapter. Raises NotFoundError if there is none of that name."""
        with self._lock:
            self.engine.unload_adapter(name)

    def generate(
        self,
        messages: Messages,
        *,
        effort: Effort | str | None = None,
        instructions: str | None = None,
        tools: Sequence[ToolDescription | ToolNamespace] = (),
        output_schema: Mapping[str, Any] | None = None,
        enforce: bool = True,
        current_date: str | None = None,
        **sampling: Any,
    ) -> Generation:
        """Answer ``messages``; iterate over the result for the deltas of the answer as they come.

        ``effort`` is "low", "medium" (the default) or "high"; ``current_date`` is YYYY-MM-DD and today's by default.
        They, ``instructions``, ``tools`` and ``output_schema``, the JSON Schema of the final answer, make the system
        and developer messages, which ``messages`` may hold instead. What is elsewhere called the system prompt is
        ``instructions`` here: a system message of your own stands as it is, without the lines on reasoning and channels
        that the model was trained with, unless its content is a SystemContent.

        Where these messages declare tools or an output schema, the answer is sampled under their grammar: no other tool
        is called, arguments are JSON that matches their schemas where these can be enforced, and a final answer matches
        the output schema. ``enforce`` false tells the model of them and no more.

        ``sampling`` are fields of `ossia.engine.SamplingParams`: max_tokens, temperature, top_p, seed, adapter, ...;
        those that the checkpoint's generation_config.json names hold unless they are given. ``stop_strings`` are looked
        for in the final answer alone, and are no part of it. A call of a tool ends the answer: see
        ``Generation.messages``, and `ossia.Agent`, which runs tools. Of earlier turns that were answered, the chain of
        thought is left out.

        Raises InputError for what cannot be used or enforced and ContextLengthError for what cannot fit.
        """
        conversation = make_conversation(messages, effort, instructions, tools, current_date, output_schema)
        prompt = render_for_completion(conversation, self.tokenizer, drop_analysis="past_turns")
        is_bound = enforce and "constraint" not in sampling and not sampling.get("ignore_eos")
        if is_bound and _declares(conversation):
            sampling["constraint"] = self.constraint(conversation.messages)
        return self.complete(prompt, **sampling)

    def constraint(self, messages: Sequence[Message], *, tool_choice: ToolChoice = AUTO) -> Constraint:
        """What keeps one generation to the tools and the response format that ``messages`` declare: the field of that
        name of `SamplingParams`. Of tools whose schemas cannot be enforced the arguments are any JSON object.

        The first one takes about a second. Raises InputError for an output schema that cannot be enforced.
        """
        make = partial(declared_grammar, messages, tool_choice=tool_choice, output_param="output_schema")
        loose: set[str] = set()
        while True:
            try:
                return self._compiler.constraint(make(loose=loose))
            except InputError as error:
                if error.param == "tools":
                    # One by one they can be.
                    return self._compiler.constraint(make(strict=False))
                if error.param is None or error.param == "output_schema" or error.param in loose:
                    raise
                loose.add(error.param)

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        # Half a second to import, for what has tools or a schema.
        from ossia.engine.masks import GrammarCompiler

        return GrammarCompiler(self.tokenizer)

    def complete(self, prompt_token_ids: Sequence[int], **sampling: Any) -> Generation:
        """Answer a rendered prompt, which ends in the opening of an assistant message."""
        params = self.params(**sampling)
        # The engine would find them in thoughts and headers too.
        stops = TextStops(params.stop_strings)
        with self._lock:
            self._abort_dropped()
            request_id = self.engine.add_request(prompt_token_ids, replace(params, stop_strings=()))
            self._outputs[request_id] = deque()
        return Generation(self, request_id, prompt_token_ids, stops)

    def params(self, **sampling: Any) -> SamplingParams:
        """What `complete` samples by. Raises InputError for a parameter that is unknown, or has an impossible value."""
        for name in sampling:
            if name not in _PARAMETERS:
                raise InputError(f"unknown parameter {name!r}; expected one of: {', '.join(_PARAMETERS)}", param=name)
        if isinstance(sampling.get("stop_strings"), str):
            # As one would say it: its letters are not meant.
            sampling["stop_strings"] = (sampling["stop_strings"],)
        try:
            params = SamplingParams(**{**self.sampling, **sampling})
        except TypeError as error:
            raise InputError(f"the sampling parameters cannot be used: {error}") from None
        if not params.ignore_eos:
            # Not every published generation_config.json names <|call|>: behind it the model would invent the result.
            params = replace(params, stop_token_ids=(*params.stop_token_ids, *self.tokenizer.stop_ids))
        return params

    def _next_output(self, request_id: int) -> TokenOutput:
        """The next token of one request; tokens that other requests get meanwhile are kept for them."""
        while True:
            with self._lock:
                own = self._outputs.get(request_id)
                if own is None:
                    raise OssiaError(
                        "this answer was lost when the model failed, or was interrupted, at another; ask again"
                    )
                if own:
                    return own.popleft()
                self._step()

    def _step(self) -> None:
        self._abort_dropped()
        try:
            outputs = self.engine.step()
        except BaseException:
            # The engine has forgotten all requests: nobody is to wait for their tokens.
            self._outputs.clear()
            raise
        for output in outputs:
            if output.request_id in self._outputs:
                self._outputs[output.request_id].append(output)

    def _abort_dropped(self) -> None:
        while self._dropped:
            self._forget(self._dropped.popleft())

    def _forget(self, request_id: int) -> None:
        with self._lock:
            if self._outputs.pop(request_id, None) is not None:
                self.engine.abort(request_id)


class Generation(Iterator[Delta]):
    """One answer under way: an iterator of deltas, and what is known of it so far.

    A delta tells its ``channel`` ("analysis" is the chain of thought and not for end users, "final" the answer,
    "commentary" a call of a tool or a word on what is being done). Leaving the iteration early, by ``close`` or the end
    of a ``with`` block, gives the engine's memory back; of an object that was dropped, the next use of the model does.
    """

    def __init__(self, model: LocalModel, request_id: int, prompt_token_ids: Sequence[int], stops: TextStops) -> None:
        self.prompt_token_ids = list(prompt_token_ids)
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.num_cached_tokens = 0
        self.started_s = time.perf_counter()
        """Clock when the request was made, when its first token came, and when its latest came; seconds."""
        self.first_token_s = self.started_s
        self.last_token_s = self.started_s
        self._model = model
        self._request_id = request_id
        self._parser = StreamParser(model.tokenizer)
        self._pending: deque[Delta] = deque()
        self._stops = stops
        # Of the final message that is open, or was last: its beginning, and what was shown of it.
        self._final: Header | None = None
        self._shown = ""

    def __next__(self) -> Delta:
        while not self._pending:
            if self.finish_reason is not None:
                raise StopIteration
            self._advance()
        return self._pending.popleft()

    @property
    def messages(self) -> list[ParsedMessage]:
        """The finished messages of the answer: thoughts, calls of tools, the final text."""
        messages = self._parser.messages
        if self._stops.stopped is None or self._final is None:
            return messages
        *before, last = messages
        return [*before, ParsedMessage(self._final, self._shown, last.token_ids, last.start, None, last.defects)]

    @property
    def text(self) -> str:
        """The final answer as far as it is complete; iterate first."""
        return "".join(message.text for message in self.messages if message.channel == Channel.FINAL)

    @property
    def reasoning(self) -> str:
        """The chain of thought as far as it is complete."""
        return "\n".join(message.text for message in self.messages if message.channel == Channel.ANALYSIS)

    @property
    def tokens_per_s(self) -> float:
        """Speed of the tokens behind the first."""
        elapsed_s = self.last_token_s - self.first_token_s
        return (len(self.token_ids) - 1) / elapsed_s if elapsed_s > 0 else 0.0

    def read(self) -> str:
        """Read to the end; the final answer."""
        for _ in self:
            pass
        return self.text

    def close(self) -> None:
        """Stop here."""
        if self.finish_reason is None:
            self._model._forget(self._request_id)
            self._finish("abort")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A loop that was left by `break` drops its answer without closing it. This may run anywhere, in the midst of a
        # step of the engine too, where nothing may be taken from it.
        if self.finish_reason is None:
            self._model._dropped.append(self._request_id)

    def _advance(self) -> None:
        try:
            output = self._model._next_output(self._request_id)
        except BaseException:
            self._finish("error")
            raise
        self.last_token_s = time.perf_counter()
        self.num_cached_tokens = output.num_cached_tokens
        if not self.token_ids:
            self.first_token_s = self.last_token_s
        if output.finish_reason not in ("abort", "error"):
            self.token_ids.append(output.token_id)
            self._take(self._parser.feed(output.token_id))
        if self._stops.stopped is not None:
            self._model._forget(self._request_id)
            self._finish("stop")
            return
        if output.finish_reason is not None:
            self._model._forget(self._request_id)
            self._finish(output.finish_reason)
            if output.error is not None:
                raise output.error

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._take(self._parser.close(cut=reason != "stop"))

    def _take(self, events: Sequence[Event]) -> None:
        for event in events:
            if not isinstance(event, Delta):
                self._show(self._stops.end())
            elif event.channel != Channel.FINAL or event.recipient is not None:
                self._pending.append(event)
            else:
                if self._final is not event.header:
                    self._final, self._shown = event.header, ""
                self._show(self._stops.feed(event.text))

    def _show(self, text: str) -> None:
        if text and self._final is not None:
            self._shown += text
            self._pending.append(Delta(text, self._final))


def make_conversation(
    messages: Messages,
    effort: Effort | str | None = None,
    instructions: str | None = None,
    tools: Sequence[ToolDescription | ToolNamespace] = (),
    current_date: str | None = None,
    output_schema: Mapping[str, Any] | None = None,
) -> Conversation:
    """A conversation that begins with a system message, and a developer message where there is something to say.

    ``tools`` are functions, or whole namespaces, of which python and browser stand in the system message.
    Raises InputError if ``messages`` bring their own and the arguments ask for another.
    """
    given = [_with_channel(message) for message in read_messages(messages)]
    roles = {message.role for message in given}
    trained, others = _namespaces(tools)
    opening: list[Message] = []
    if Role.SYSTEM in roles:
        if effort is not None or current_date is not None or trained:
            raise InputError(
                "effort, current_date, python and browser belong to the system message, but the messages have one"
            )
    else:
        date = checked_date(current_date) if current_date is not None else datetime.date.today().isoformat()
        opening.append(Message(Role.SYSTEM, SystemContent(effort=_effort(effort), current_date=date, tools=trained)))
    if instructions or others or output_schema is not None:
        if Role.DEVELOPER in roles:
            raise InputError(
                "instructions, tools and output_schema belong to the developer message, but the messages have one"
            )
        content = DeveloperContent(instructions, others, () if output_schema is None else (_format(output_schema),))
        opening.append(Message(Role.DEVELOPER, content))
    system = [message for message in given if message.role is Role.SYSTEM]
    rest = [message for message in given if message.role is not Role.SYSTEM]
    return Conversation((*system, *opening, *rest))


def _namespaces(
    tools: Sequence[ToolDescription | ToolNamespace],
) -> tuple[tuple[ToolNamespace, ...], tuple[ToolNamespace, ...]]:
    """Namespaces of the system message, and of the developer message."""
    functions, spaces = [], []
    if not isinstance(tools, Sequence):
        raise InputError(f"tools is {tools!r:.80}; expected a list", param="tools")
    for i, tool in enumerate(tools):
        # A function with @ossia.tool has one.
        tool = getattr(tool, "declaration", tool)
        if isinstance(tool, ToolNamespace):
            spaces.append(tool)
        elif isinstance(tool, ToolDescription):
            functions.append(tool)
        else:
            raise InputError(
                f"tools[{i}] is {tool!r:.80}; expected a ToolDescription or a function with @ossia.tool",
                param="tools",
            )
    if functions:
        spaces.append(ToolNamespace.functions(functions))
    trained = tuple(space for space in spaces if space.name in TRAINED_NAMESPACES)
    return trained, tuple(space for space in spaces if space.name not in TRAINED_NAMESPACES)


def _format(schema: Mapping[str, Any]) -> ResponseFormat:
    if not isinstance(schema, Mapping):
        raise InputError(
            f"output_schema is {schema!r:.80}; expected a JSON Schema as a dict, as a pydantic model's "
            "model_json_schema() gives it",
            param="output_schema",
        )
    title = schema.get("title")
    return ResponseFormat(title if isinstance(title, str) and title else "answer", schema)


def _declares(conversation: Conversation) -> bool:
    """Whether there are tools that may be called, or a form for the answer."""
    parts = [part for message in conversation.messages for part in message.content]
    return any(
        (isinstance(part, SystemContent | DeveloperContent) and part.tools)
        or (isinstance(part, DeveloperContent) and part.response_formats)
        for part in parts
    )


def read_messages(messages: Messages) -> tuple[Message, ...]:
    """Messages as they may be given to `LocalModel.generate`. Raises InputError naming the one at fault."""
    if isinstance(messages, str):
        return (Message(Role.USER, messages),)
    if isinstance(messages, Message):
        return (messages,)
    if not isinstance(messages, Iterable):
        raise InputError(f"messages is {messages!r:.80}; expected a text or a list of messages", param="messages")
    return tuple(
        message if isinstance(message, Message) else Message.from_dict(message, f"messages[{i}]")
        for i, message in enumerate(messages)
    )


def _with_channel(message: Message) -> Message:
    """What an assistant has said, and to nobody else, is its answer."""
    if message.role is not Role.ASSISTANT or message.channel is not None or message.recipient is not None:
        return message
    return Message(Role.ASSISTANT, message.content, channel=str(Channel.FINAL), name=message.name)


def checked_date(text: str) -> str:
    """A date as the model is told it. Raises InputError unless it is YYYY-MM-DD."""
    try:
        return datetime.datetime.strptime(text, "%Y-%m-%d").date().isoformat()
    except (TypeError, ValueError):
        raise InputError(f"current_date is {text!r}; expected YYYY-MM-DD", param="current_date") from None


def _effort(effort: Effort | str | None) -> Effort:
    try:
        return Effort(effort or Effort.MEDIUM)
    except ValueError:
        raise InputError(f"effort is {effort!r}; expected one of: {', '.join(Effort)}", param="effort") from None


def demonstration(config: Config) -> str:
    """What the embedded model is, and how to get a real one; "" for another model."""
    if config.model != EMBEDDED:
        return ""
    here = downloaded()
    better = f"here are {', '.join(here)} for --model" if here else "`ossia pull gpt-oss-20b` fetches a real one"
    return f"The model is {EMBEDDED}, a small demonstration that comes with ossia; {better}"


def tell_of_demonstration(config: Config) -> None:
    """Log what the embedded model is, where it is the model."""
    if words := demonstration(config):
        _log.warning("%s", words)


def check_memory(config: Config, shape: ModelConfig, held: HeldBytes = MXFP4_EXPERTS) -> None:
    """Raise UnavailableError, with numbers, where a model cannot run; warn where it would be read from the disk.

    ``held`` is what its file holds in another form than the published ones.
    """
    if config.backend != "cpu":
        return
    own, weights = own_bytes(shape, config.dense, config.kv_memory, held), weight_bytes(shape, config.dense, held)
    available, _ = available_bytes()
    if own > available:
        raise UnavailableError(
            f"the model needs {own / 2**30:.1f} GiB beside its mapped file (keys and values "
            f"{config.kv_memory / 2**30:.1f} GiB of it), and {available / 2**30:.1f} GiB are free. Free some, or give "
            "less with --kv-memory or --dense bf16"
        )
    if weights + config.kv_memory > available:
        _log.warning(
            "the weights take %.1f GiB and %.1f GiB are free: experts will be read from the disk again and again",
            weights / 2**30,
            available / 2**30,
        )


def backend_options(config: Config) -> dict[str, Any]:
    """The options that `ossia.ops.load` takes for the backend of these settings."""
    if config.backend != "cpu":
        return {}
    return {"threads": config.threads or None, "dense": config.dense, "kv": config.kv}


def make_runner(config: Config, ops: AdapterOps, checkpoint: Checkpoint, options: EngineConfig) -> Runner:
    """Load the weights, and give keys and values the memory that the settings allow, or that a GPU has left.

    Raises UnavailableError, with numbers, where a GPU does not hold the model.
    """
    if config.backend != "gpu":
        if config.tp > 1:
            raise ConfigError(f"tp is {config.tp}; only GPUs share a model: give --backend gpu", param="tp")
        return Runner(ops, checkpoint.config, load_weights(checkpoint, ops), options)
    # It brings torch, which no other backend needs.
    from ossia.engine.parallel import load_team_runner

    return load_team_runner(ops, checkpoint, options, config.gpu_memory, config.tp)


def open_share(config: Config) -> TeamRunner | None:
    """In a process that torchrun started beside a first one: its share of the model, to `follow` with; else None."""
    if config.backend != "gpu":
        return None
    ops = backends.load(config.backend)
    from ossia.engine.parallel import TeamRunner, is_follower

    if not is_follower():
        return None
    runner = make_runner(config, ops, _open_checkpoint(config), _engine_options(config))
    assert isinstance(runner, TeamRunner)
    return runner


def _check_first(config: Config) -> None:
    """Raise UnavailableError in a process beside a first one that did not ask `open_share` what it is there for."""
    if config.backend == "gpu":
        from ossia.engine.parallel import is_follower

        if is_follower():
            raise UnavailableError(
                "this runs in one process, and torchrun started several. `ossia serve` and `ossia generate` take them"
            )


def _open_checkpoint(config: Config) -> Checkpoint:
    tell_of_demonstration(config)
    checkpoint = Checkpoint.open(resolve_model(config.model))
    check_memory(config, checkpoint.config, HeldBytes.of(checkpoint.tensors))
    return checkpoint


def _engine_options(config: Config) -> EngineConfig:
    return EngineConfig(
        kv_memory_bytes=config.kv_memory,
        max_context=config.max_context or None,
        adapter_memory_bytes=config.adapter_memory,
        draft_tokens=config.draft_tokens,
    )
