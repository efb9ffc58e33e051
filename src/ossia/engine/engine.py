"""Tokens in, tokens out: `Engine` step by step, `AsyncEngine` with a thread of its own for many callers at once.

    step:   schedule -> batch -> run -> sample -> update

A fault of one sequence (its constraint, its logits) ends that sequence alone; a fault of a whole step ends every
sequence that was under way, and the engine starts afresh.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from ossia.engine.batch import Scheduled, make_batch
from ossia.engine.block_manager import BlockManager
from ossia.engine.request import NO_TOKEN, Constraint, FinishReason, SamplingParams, Sequence, TokenOutput
from ossia.engine.runner import Runner, max_context
from ossia.engine.sampler import Asked, Draw, Mask, Sampled
from ossia.engine.scheduler import Scheduler, Totals
from ossia.errors import ConfigError, ContextLengthError, InputError, NotFoundError, OssiaError, UnavailableError
from ossia.model.adapted import HeldAdapter, held_bytes
from ossia.model.adapter import Adapter
from ossia.model.transformer import Weights

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of an engine."""

    num_running: int
    num_waiting: int
    num_full_blocks: int
    num_free_full_blocks: int
    num_window_blocks: int
    num_free_window_blocks: int
    num_adapters: int
    # Those that were let go but still answer included.
    adapter_bytes: int
    # They only grow: a rate is a difference over time.
    totals: Totals


class Engine:
    """Generates tokens for many requests at once, one step at a time; for use by one thread.

    ``token_bytes`` gives the bytes of a token's text; only stop strings need it.
    """

    def __init__(self, runner: Runner, *, token_bytes: Callable[[int], bytes] | None = None) -> None:
        self._runner = runner
        self._token_bytes = token_bytes
        self.max_context = max_context(runner.config, runner.options)
        self._num_requests = 0
        self._totals = Totals()
        self._mask_thread: ThreadPoolExecutor | None = None
        self._adapters: dict[str, HeldAdapter] = {}
        self._adapters_lock = threading.Lock()
        self.reset()

    # Requests --------------------------------------------------------------------------------------------------------

    def check(self, token_ids: SequenceOf[int], params: SamplingParams) -> int:
        """The most tokens that the answer may have. May be called from any thread.

        Raises InputError for a prompt or a parameter that cannot be used, ContextLengthError if prompt and answer can
        never fit the context or the memory.
        """
        vocab_size = self._runner.config.vocab_size
        if not len(token_ids):
            raise InputError("the prompt has no tokens; it needs at least one", param="token_ids")
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
            raise InputError(
                f"the prompt holds token {wrong}; this model has tokens 0 to {vocab_size - 1}", param="token_ids"
            )
        params.check_token_ids(vocab_size)
        self._adapter(params)
        if params.stop_strings and self._token_bytes is None:
            raise InputError("stop_strings need an engine that was given token_bytes", param="stop_strings")
        if params.score_from is not None and params.score_from >= len(token_ids):
            raise InputError(
                f"score_from is {params.score_from}; the prompt has tokens up to {len(token_ids) - 1}",
                param="score_from",
            )
        if params.routing and not self._runner.options.record_routing:
            raise InputError("routing needs an engine that was set up with record_routing", param="routing")
        # The last token of an answer is never computed.
        in_memory = self._runner.num_blocks.full * self._runner.options.block_size + 1
        limit, where = min((self.max_context, "the context window"), (in_memory, "the memory for keys and values"))
        num_asked = 1 if params.max_tokens is None else params.max_tokens
        if len(token_ids) + num_asked > limit:
            raise ContextLengthError(
                f"the prompt has {len(token_ids)} tokens and the answer may have {num_asked}, together "
                f"{len(token_ids) + num_asked}; {where} holds {limit}",
                param="token_ids" if len(token_ids) >= limit else "max_tokens",
            )
        return params.max_tokens or limit - len(token_ids)

    def add_request(self, token_ids: SequenceOf[int], params: SamplingParams) -> int:
        """Queue a prompt; the id under which its tokens come out of `step`. Raises what `check` raises."""
        max_tokens = self.check(token_ids, params)
        request_id = self._num_requests
        self._num_requests += 1
        sequence = Sequence(
            request_id,
            token_ids,
            params,
            max_tokens,
            self._runner.config.stop_token_ids,
            self._token_bytes,
            self._adapter(params),
        )
        self._sequences[request_id] = sequence
        self._scheduler.add(sequence)
        return request_id

    def abort(self, request_id: int) -> None:
        """End a request: its blocks are free for the next step, which reports it. One that has ended stays ended."""
        if request_id in self._sequences:
            self._ended.append(self._end(self._sequences[request_id], "abort"))

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._ended)

    # Adapters --------------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that requests may give. May be asked from any thread, as may all that concerns adapters."""
        return tuple(self._adapters)

    def load_adapter(self, adapter: Adapter) -> None:
        """Take in an adapter, in place of another of its name; sequences under way stay with the one they began with.

        Raises ConfigError where the memory for adapters does not hold it.
        """
        with self._adapters_lock:
            others = sum(one.size_bytes for one in self._held(without=adapter.name))
            size, limit = held_bytes(adapter), self._runner.options.adapter_memory_bytes
            if others + size > limit:
                raise ConfigError(
                    f"adapter {adapter.name!r} takes {size / 2**20:.1f} MiB beside {others / 2**20:.1f} MiB of others; "
                    f"adapter_memory is {limit / 2**20:.1f} MiB. Unload another, or give more.",
                    param="adapter_memory",
                )
            self._adapters[adapter.name] = self._runner.hold(adapter)

    def unload_adapter(self, name: str) -> None:
        """Let go of an adapter: sequences under way finish with it, new requests may not name it.

        Raises NotFoundError if there is none of that name.
        """
        with self._adapters_lock:
            if self._adapters.pop(name, None) is None:
                raise self._no_adapter(name)

    def _adapter(self, params: SamplingParams) -> HeldAdapter | None:
        if params.adapter is None:
            return None
        held = self._adapters.get(params.adapter)
        if held is None:
            raise self._no_adapter(params.adapter)
        return held

    def _no_adapter(self, name: str) -> NotFoundError:
        known = ", ".join(self.adapters) or "none"
        return NotFoundError(f"there is no adapter {name[:200]!r}; loaded are: {known}", param="adapter")

    def _held(self, *, without: str | None = None) -> set[HeldAdapter]:
        """All adapters that take memory, but for the one that is about to be replaced."""
        loaded = [one for name, one in list(self._adapters.items()) if name != without]
        answering = [sequence.adapter for sequence in list(self._sequences.values())]
        return {one for one in (*loaded, *answering) if one is not None}

    # Steps -----------------------------------------------------------------------------------------------------------

    def step(self) -> list[TokenOutput]:
        """Advance every request that can be: by a token each, or by more where a draft of what comes next was right.

        If the model fails, its exception comes out here; all requests are then forgotten and new ones may be added.
        """
        try:
            return self._step()
        except BaseException:
            self.reset()
            raise

    def reset(self) -> None:
        """Forget all requests and all that is cached: after a failed step, or when the weights have changed."""
        options, num_blocks = self._runner.options, self._runner.num_blocks
        self._blocks = BlockManager(num_blocks.full, num_blocks.window, options.block_size, self._runner.window)
        draft_tokens = options.draft_tokens if self._runner.takes_drafts else 0
        self._scheduler = Scheduler(
            self._blocks, options.max_batch_tokens, options.max_num_seqs, self._totals, draft_tokens
        )
        self._sequences: dict[int, Sequence] = {}
        # Requests that ended between steps.
        self._ended: list[TokenOutput] = []

    def replace_weights(self, weights: Weights) -> None:
        """Go on with other weights of the same shape; what was cached is forgotten. No request may be under way."""
        assert not self.has_work, "requests are under way"
        self._runner.replace_weights(weights)
        self.reset()

    def stats(self) -> EngineStats:
        """May be called from any thread."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_full_blocks=self._blocks.full_pool.num_blocks,
            num_free_full_blocks=self._blocks.full_pool.num_free,
            num_window_blocks=self._blocks.window_pool.num_blocks,
            num_free_window_blocks=self._blocks.window_pool.num_free,
            num_adapters=len(self._adapters),
            adapter_bytes=sum(one.size_bytes for one in self._held()),
            totals=replace(self._totals),
        )

    def close(self) -> None:
        """End the thread that fills masks, if there is one, and the processes that compute with this one."""
        if self._mask_thread is not None:
            self._mask_thread.shutdown()
            self._mask_thread = None
        self._runner.close()

    def _step(self) -> list[TokenOutput]:
        outputs, self._ended = self._ended, []
        scheduled = self._scheduler.schedule()
        if not scheduled:
            return outputs
        batch = make_batch(scheduled)
        # Masks are filled beside the forward pass.
        scored, asked, draws = _wanted(scheduled)
        draws = self._fill_masks(draws)
        logits_RV = self._runner.run(batch)
        if asked:
            for sequence, logprobs in zip(scored, self._runner.score(logits_RV, asked), strict=True):
                sequence.prompt_logprobs.append(logprobs)
        for sequence, num_tokens, _ in scheduled:
            self._blocks.commit(sequence.blocks, sequence.token_ids, num_tokens)
        self._totals.num_steps += 1
        self._totals.num_computed_tokens += len(batch.token_ids_T)
        self._totals.num_drafted_tokens += sum(len(one.draft) for one in scheduled)
        while draws:
            tokens = self._runner.sample(logits_RV, draws)
            new = [self._append(draw.sequence, token) for draw, token in zip(draws, tokens, strict=True)]
            outputs += new
            draws = self._fill_masks(self._drafted(draws, new))
        return outputs

    def _drafted(self, draws: Iterable[Draw], outputs: Iterable[TokenOutput]) -> list[Draw]:
        """The next draws of sequences whose last token was drafted: its logits are there."""
        following = []
        for (row, sequence, _, draft), output in zip(draws, outputs, strict=True):
            if output.finish_reason is None and draft and output.token_id == draft[0]:
                self._blocks.commit(sequence.blocks, sequence.token_ids, 1)
                self._totals.num_accepted_tokens += 1
                following.append(Draw(row + 1, sequence, draft=draft[1:]))
        return following

    def _fill_masks(self, draws: Iterable[Draw]) -> list[Draw]:
        """The same draws with their masks, which are filled meanwhile."""
        filled = []
        for draw in draws:
            constraint = draw.sequence.constraint
            if constraint is not None:
                if self._mask_thread is None:
                    self._mask_thread = ThreadPoolExecutor(1, thread_name_prefix="ossia-masks")
                num_words = -(-self._runner.config.vocab_size // 32)
                draw = draw._replace(mask=self._mask_thread.submit(_filled, constraint, num_words))
            filled.append(draw)
        return filled

    def _append(self, sequence: Sequence, token: Sampled | Exception) -> TokenOutput:
        try:
            if isinstance(token, Exception):
                raise token
            if sequence.constraint is not None:
                sequence.constraint.accept(token.token_id)
            finish_reason, stop = sequence.append(token.token_id)
        # A constraint and the bytes of tokens are the caller's code: whatever they raise ends this sequence alone.
        except Exception as error:
            return self._end(sequence, "error", error if isinstance(error, OssiaError) else _failure(error))
        self._totals.num_sampled_tokens += 1
        routing = None
        if finish_reason is not None:
            if sequence.params.routing:
                routing = self._runner.routing(sequence.blocks.full.blocks, sequence.blocks.num_tokens)
            self._forget(sequence)
        return TokenOutput(
            sequence.request_id,
            token.token_id,
            token.logprob,
            token.top_logprobs,
            finish_reason,
            stop,
            0 if finish_reason else sequence.stops.held_bytes,
            sequence.num_cached_tokens or 0,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if sequence.num_output_tokens == 1 else (),
            drawn_logprob=token.drawn_logprob,
            routing=routing,
        )

    def _end(self, sequence: Sequence, reason: FinishReason, error: OssiaError | None = None) -> TokenOutput:
        self._forget(sequence)
        num_cached_tokens = sequence.num_cached_tokens or 0
        return TokenOutput(
            sequence.request_id, NO_TOKEN, finish_reason=reason, num_cached_tokens=num_cached_tokens, error=error
        )

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request_id]


def _wanted(scheduled: Iterable[Scheduled]) -> tuple[list[Sequence], list[Asked], list[Draw]]:
    """What becomes of each row of the logits: whose prompts are scored, by which rows, and who gets a token."""
    scored: list[Sequence] = []
    asked: list[Asked] = []
    draws: list[Draw] = []
    row = 0
    for one in scheduled:
        sequence = one.sequence
        place = (sequence.params.score_from or 0) + len(sequence.prompt_logprobs)
        for i in range(len(one.scored_rows)):
            scored.append(sequence)
            asked.append(Asked(row, sequence.token_ids[place + i], sequence.params.top_logprobs))
            row += 1
        if one.is_sampled:
            draws.append(Draw(row, sequence, draft=one.draft))
            row += 1 + len(one.draft)
    return scored, asked, draws


def _filled(constraint: Constraint, num_words: int) -> Mask:
    mask = np.zeros(num_words, np.uint32)
    constraint.fill(mask)
    return mask


# Many callers --------------------------------------------------------------------------------------------------------


class _Reader:
    """The caller's end of one request: a queue in the caller's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.queue: asyncio.Queue[TokenOutput | OssiaError] = asyncio.Queue()
        # Known to the engine's thread alone.
        self.request_id = -1


class _Add(NamedTuple):
    reader: _Reader
    token_ids: SequenceOf[int]
    params: SamplingParams


class _Leave(NamedTuple):
    reader: _Reader


class AsyncEngine:
    """An engine in a thread of its own, for callers in any event loop. The engine is not to be used otherwise.

    Use it as an async context manager, or call `close` at the end.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # None asks the thread to end; nothing is put after it.
        self._commands: queue.SimpleQueue[_Add | _Leave | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="ossia-engine", daemon=True)
        self._thread.start()

    def generate(self, token_ids: SequenceOf[int], params: SamplingParams) -> AsyncGenerator[TokenOutput, None]:
        """The tokens of one answer as they are sampled; the last one has a finish_reason.

        To be called in an event loop. Raises what `Engine.check` raises at once. Iterating raises OssiaError if the
        request fails, UnavailableError if the engine is shut down. Leaving the iterator (aclose,
        cancellation) aborts the request.
        """
        self._engine.check(token_ids, params)
        return self._read(_Add(_Reader(asyncio.get_running_loop()), token_ids, params))

    def check(self, token_ids: SequenceOf[int], params: SamplingParams) -> int:
        """What `Engine.check` says, in any thread."""
        return self._engine.check(token_ids, params)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def load_adapter(self, adapter: Adapter) -> None:
        """What `Engine.load_adapter` does, in any thread and while requests are under way."""
        self._engine.load_adapter(adapter)

    def unload_adapter(self, name: str) -> None:
        """What `Engine.unload_adapter` does, likewise."""
        self._engine.unload_adapter(name)

    def through(self, adapter: str) -> AdapterEngine:
        """The same engine for callers all of whose requests go through one adapter."""
        return AdapterEngine(self, adapter)

    def close(self) -> None:
        """End the thread after the step it is in; whoever still waits for tokens gets UnavailableError."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._commands.put(None)
        self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # In the caller's event loop --------------------------------------------------------------------------------------

    async def _read(self, request: _Add) -> AsyncGenerator[TokenOutput, None]:
        if not self._send(request):
            raise _shut_down()
        has_ended = False
        try:
            while not has_ended:
                item = await request.reader.queue.get()
                has_ended = _is_last(item)
                if isinstance(item, OssiaError):
                    raise item
                yield item
        finally:
            if not has_ended:
                self._send(_Leave(request.reader))

    def _send(self, command: _Add | _Leave) -> bool:
        with self._lock:
            if not self._is_closed:
                self._commands.put(command)
            return not self._is_closed

    # In the engine's thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        readers: dict[int, _Reader] = {}
        while self._obey(readers):
            try:
                outputs = self._engine.step()
            # Whatever a step raises, callers must hear of it rather than wait for ever.
            except Exception as error:
                _log.exception("step failed, requests=%d", len(readers))
                self._deliver(readers, [(request_id, _failure(error)) for request_id in readers])
            else:
                self._deliver(readers, [(output.request_id, output.error or output) for output in outputs])
        self._deliver(readers, [(request_id, _shut_down()) for request_id in readers])
        self._engine.close()

    def _obey(self, readers: dict[int, _Reader]) -> bool:
        """Carry out what callers asked for since the last step, waiting if there is nothing to do; False to end."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            match command:
                case None:
                    return False
                case _Add(reader, token_ids, params):
                    try:
                        reader.request_id = self._engine.add_request(token_ids, params)
                        readers[reader.request_id] = reader
                    # A prompt that cannot even be queued must not take the engine down.
                    except Exception as error:
                        _post(reader.loop, [(reader, error if isinstance(error, OssiaError) else _failure(error))])
                case _Leave(reader):
                    readers.pop(reader.request_id, None)
                    self._engine.abort(reader.request_id)

    def _deliver(self, readers: dict[int, _Reader], items: list[tuple[int, TokenOutput | OssiaError]]) -> None:
        """Hand every item to its reader, waking each event loop once; requests of a closed loop are aborted."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Reader, TokenOutput | OssiaError]]] = {}
        for request_id, item in items:
            # A request that was aborted has no reader any more.
            if request_id in readers:
                reader = readers.pop(request_id) if _is_last(item) else readers[request_id]
                by_loop.setdefault(reader.loop, []).append((reader, item))
        for loop, deliveries in by_loop.items():
            if not _post(loop, deliveries):
                for reader, _ in deliveries:
                    readers.pop(reader.request_id, None)
                    self._engine.abort(reader.request_id)


class AdapterEngine:
    """An `AsyncEngine` as those see it whose requests all go through one adapter."""

    def __init__(self, engine: AsyncEngine, adapter: str) -> None:
        self._engine = engine
        self._adapter = adapter

    def check(self, token_ids: SequenceOf[int], params: SamplingParams) -> int:
        return self._engine.check(token_ids, replace(params, adapter=self._adapter))

    def generate(self, token_ids: SequenceOf[int], params: SamplingParams) -> AsyncGenerator[TokenOutput, None]:
        return self._engine.generate(token_ids, replace(params, adapter=self._adapter))


def _is_last(item: TokenOutput | OssiaError) -> bool:
    return isinstance(item, OssiaError) or item.finish_reason is not None


def _post(loop: asyncio.AbstractEventLoop, deliveries: list[tuple[_Reader, TokenOutput | OssiaError]]) -> bool:
    """Put items into their readers' queues in that event loop; False if it is closed."""

    def put() -> None:
        for reader, item in deliveries:
            reader.queue.put_nowait(item)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        return False
    return True


def _failure(error: Exception) -> OssiaError:
    """A new error for one caller: one object raised in many tasks would mix their tracebacks."""
    failure = OssiaError(f"the engine failed with {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _shut_down() -> UnavailableError:
    return UnavailableError("the engine has been shut down; start it again")
