"""Offline use: many prompts at once, answers in order."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ossia.engine.engine import Engine
from ossia.engine.request import FinishReason, SamplingParams, Scored, TokenOutput
from ossia.engine.stops import Stop
from ossia.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer to one prompt; the fields are those of `TokenOutput`, over all its tokens."""

    token_ids: tuple[int, ...]
    # Empty if they were not asked for.
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: FinishReason
    stop: Stop | None
    num_cached_tokens: int
    # As the others, empty if they were not asked for.
    drawn_logprobs: tuple[float, ...] = ()
    routing: npt.NDArray[np.uint16] | None = None
    prompt_logprobs: tuple[Scored, ...] = ()


class LLM:
    """Answers lists of prompts with one engine, which no one else uses meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        params: SamplingParams | SequenceOf[SamplingParams],
        *,
        progress: bool = False,
    ) -> list[Completion]:
        """One answer for each prompt, in order; ``params`` for all, or one for each.

        Raises InputError before anything is computed if a prompt cannot be used, and the error of the first request
        that fails, aborting the others.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InputError(f"there are {len(prompts)} prompts and {len(each)} params; give as many", param="params")
        for prompt, own in zip(prompts, each, strict=True):
            self._engine.check(prompt, own)
        outputs: dict[int, list[TokenOutput]] = {
            self._engine.add_request(prompt, own): [] for prompt, own in zip(prompts, each, strict=True)
        }
        try:
            with _progress_bar() if progress else nullcontext() as bar:
                task = bar.add_task("generating", total=len(prompts), tokens_per_s=0.0) if bar else None
                num_tokens = 0
                while self._engine.has_work:
                    for output in self._engine.step():
                        if output.error is not None:
                            raise output.error
                        if output.request_id in outputs:
                            outputs[output.request_id].append(output)
                            num_tokens += 1
                            if bar and task is not None:
                                elapsed_s = bar.tasks[0].elapsed or 1e-9
                                bar.update(
                                    task,
                                    advance=output.finish_reason is not None,
                                    tokens_per_s=num_tokens / elapsed_s,
                                )
        finally:
            for request_id in outputs:
                self._engine.abort(request_id)
        return [_completion(own) for own in outputs.values()]


def _progress_bar() -> Progress:
    # Importing it takes longer than the rest of the engine: only who wants a bar waits for it.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens_per_s]:.1f} tokens/s"),
        TimeRemainingColumn(),
    )


def _completion(outputs: list[TokenOutput]) -> Completion:
    last = outputs[-1]
    assert last.finish_reason is not None
    return Completion(
        token_ids=tuple(output.token_id for output in outputs),
        logprobs=tuple(output.logprob for output in outputs if output.logprob is not None),
        top_logprobs=tuple(output.top_logprobs for output in outputs if output.top_logprobs),
        finish_reason=last.finish_reason,
        stop=last.stop,
        num_cached_tokens=last.num_cached_tokens,
        drawn_logprobs=tuple(output.drawn_logprob for output in outputs if output.drawn_logprob is not None),
        routing=last.routing,
        prompt_logprobs=outputs[0].prompt_logprobs,
    )
