"""The result of a run: written, read again, compared with what was trained, and tried.

    LoRA            OUT/adapter/               PEFT's folder, which `ossia serve --adapter` and PEFT load
    full training   OUT/weights.safetensors    what was trained by name; `ossia export --weights` makes a model of it

Many a fine-tuned model was found broken by its first user. So before a run is called done, its result is read from the
disk into the model again, and must give the same numbers; it is told how far it is from the model that training began
with; and it answers a few questions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ossia.errors import TrainingError, UnavailableError
from ossia.harmony import Message, Role, SystemContent, Tokenizer, render_for_completion
from ossia.local import load
from ossia.model.adapter import read_adapter, write_adapter
from ossia.model.hub import resolve_model
from ossia.ops import Batch
from ossia.train.checkpoint import sync_tree
from ossia.train.config import DataSettings, TrainConfig
from ossia.train.data import TrainBatch
from ossia.train.fit import Fitted, Kind, begin_with, fit, lora_config, sample_passes, set_up_team
from ossia.train.lora import pairs_off, take_scaling, to_adapter
from ossia.train.losses import kl_sum
from ossia.train.module import Model
from ossia.train.parallel import Team, extents
from ossia.train.run import Outcome, Say, load_parameters
from ossia.train.shards import read_shards, write_tensors
from ossia.train.trainer import Objective

if TYPE_CHECKING:
    from collections.abc import Iterator

ADAPTER, WEIGHTS = "adapter", "weights.safetensors"

_NUM_QUESTIONS = 4
# Logits of a row are 0.8 MB for the published vocabulary.
_MAX_ROWS = 64
# Keys and values of a few short answers.
_ENGINE_BYTES = 256 << 20
# The same numbers from the same weights, but for the order of additions of a GPU.
_TOLERANCE = 1e-3


class Trial(NamedTuple):
    """What was found when the result was tried."""

    difference: float  # largest difference of a logit between what was trained and what was read from the disk
    kl: float  # mean KL(model before training || result), nats, over rows of the data
    answers: tuple[tuple[str, str], ...]  # questions and what the result said


def fit_and_try(
    settings: DataSettings,
    kind: Kind,
    objective: Callable[[Model, Team], Objective[TrainBatch]],
    *,
    resume: bool,
    say: Say,
) -> Outcome:
    """`fit`, then write the result and try it; by this process alone, or together with others of torchrun."""
    with set_up_team(settings) as team:
        told = say if team.rank == 0 else tell_nothing
        fitted = fit(settings, kind, objective, team, resume=resume, say=told)
        if not fitted.outcome.is_interrupted:
            write_result(fitted.model, settings, told, team)
            try_result(fitted, settings, told)
    return fitted.outcome


def tell_nothing(text: str) -> None:
    """For processes whose first one speaks for all."""


def write_result(model: Model, settings: TrainConfig, say: Say, team: Team | None = None) -> Path:
    """Write what was trained into ``settings.out`` and return where. Raises UnavailableError when the disk refuses.

    All processes of ``team`` give what they hold, and the first one writes.
    """
    team = team or Team()
    whole = team.whole(model.state(), extents(model))
    return team.first(lambda: _write(model, whole, settings, say))


def _write(model: Model, whole: Mapping[str, Tensor], settings: TrainConfig, say: Say) -> Path:
    out = Path(settings.out)
    try:
        if settings.trainable == "lora":
            adapter = to_adapter(model.weights, lora_config(settings), out.name, whole)
            path = write_adapter(out / ADAPTER, adapter, model.config, base_model_name=settings.model)
            sync_tree(path)
            use = f"`ossia serve --model {settings.model} --adapter NAME={path}` serves it"
            if settings.fake_quant:
                use = f"`ossia export NEW --base {settings.model} --adapter {path}` makes the model that was trained"
            say(f"the adapter is in {path}; {use}")
        else:
            path = out / WEIGHTS
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            write_tensors(partial, whole)
            partial.replace(path)
            say(f"the weights are in {path}; `ossia export NEW --base {settings.model} --weights {path}` makes a model")
    except OSError as error:
        raise UnavailableError(
            f"{out}: the result could not be written: {error.strerror or error}; free some space, and --resume writes "
            "it again from the last checkpoint"
        ) from error
    return path


def try_result(fitted: Fitted, settings: DataSettings, say: Say) -> Trial:
    """Read the result again, compare it and ask it. Raises TrainingError when it is not what was trained."""
    model, tokenizer, team = fitted.model, fitted.tokenizer, fitted.team
    model.eval()
    with torch.no_grad():
        samples = fitted.held_out or sample_passes(settings, fitted.kind, tokenizer)
        batch = _few_rows(samples[0].batch)
        trained_RV = model(batch)
        _read_again(model, settings)
        read_RV = model(batch)
        difference = (read_RV - trained_RV).abs().max().item()
        if not difference <= _TOLERANCE:
            raise TrainingError(
                f"the result in {settings.out} is not the model that was trained: read again, its logits differ by up "
                f"to {difference:.3g}. Do not use it; --resume writes it again from the last checkpoint"
            )
        with _model_before(model, settings, team) as before:
            kl = (kl_sum(read_RV, before(batch)) / len(read_RV)).item()
        where = "held-out rows" if fitted.held_out else "rows of the data"
        say(f"read again, it is the same; KL to the model before, on {where}: {kl:.4f} nats a token")
        prompts = _prompts(settings, tokenizer, samples[0].batch) if settings.prompt_tokens else []
        # Beside the weights an adapter is not rounded, as it was in training.
        if settings.trainable == "lora" and not settings.fake_quant:
            answers = team.first(lambda: ask_engine(settings, prompts))
        else:
            answers = [greedy(model, prompt, settings.prompt_tokens, tokenizer.stop_ids, team) for prompt in prompts]
    shown = [(_shown(tokenizer.decode(p)), tokenizer.decode(a)) for p, a in zip(prompts, answers, strict=True)]
    for question, answer in shown:
        say(f"asked   ...{question}")
        say(f"answers {answer!r}")
    return Trial(difference, kl, tuple(shown))


def ask_engine(settings: DataSettings, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The likeliest answers of the engine that serves, with the adapter from the disk beside the packed weights."""
    if not prompts:
        return []
    # The engine's own matrices are kept as published: what is tried is the adapter, and not how they are rounded.
    local = load(resolve_model(settings.model), threads=settings.threads, dense="bf16", kv_memory=_ENGINE_BYTES)
    adapter = read_adapter(Path(settings.out) / ADAPTER, local.checkpoint.config)
    local.engine.load_adapter(adapter)
    answers = []
    for prompt in prompts:
        answer = local.complete(prompt, max_tokens=settings.prompt_tokens, temperature=0.0, adapter=adapter.name)
        for _ in answer:
            pass
        answers.append(answer.token_ids)
    return answers


def greedy(
    model: Model, prompt: Sequence[int], max_tokens: int, stop_ids: Sequence[int], team: Team | None = None
) -> list[int]:
    """The likeliest next token again and again, a stop included; the trainer computes all anew for each."""
    team = team or Team()
    token_ids = list(prompt)
    for _ in range(max_tokens):
        likeliest = model(_last_row(token_ids))[0].argmax()
        # Of two tokens that are as likely, processes might take another one each.
        token_ids.append(int(team.first(likeliest.item)))
        if token_ids[-1] in stop_ids:
            break
    return token_ids[len(prompt) :]


def _read_again(model: Model, settings: TrainConfig) -> None:
    """Put what is on the disk in the place of what was trained."""
    out, held = Path(settings.out), extents(model)
    if settings.trainable == "lora":
        whole = take_scaling(model.weights, read_adapter(out / ADAPTER, model.config))
        load_parameters(model.state(), {name: held[name].of(tensor) for name, tensor in whole.items()})
    else:
        load_parameters(model.state(), read_shards(out, Path(WEIGHTS).stem, held))


@contextmanager
def _model_before(model: Model, settings: TrainConfig, team: Team) -> Iterator[Model]:
    """The model that training began with."""
    if settings.trainable == "lora":
        with pairs_off(model.weights):
            yield model
    else:
        device, dtype = model.ops.device, model.ops.dtype
        before = Model.open(
            resolve_model(settings.model),
            device=device,
            dtype=dtype,
            trainable="full" if settings.begin_with else "lora",
            exchange=team.exchange,
        )
        if settings.begin_with:
            begin_with(before, Path(settings.begin_with))
        yield before


def _few_rows(batch: Batch) -> Batch:
    """The batch, asked for at most `_MAX_ROWS` rows, spread over it."""
    rows_R = np.asarray(batch.logit_rows_R)
    at = np.unique(np.linspace(0, len(rows_R) - 1, min(_MAX_ROWS, len(rows_R))).astype(int))
    return replace(batch, logit_rows_R=rows_R[at])


def _prompts(settings: DataSettings, tokenizer: Tokenizer, batch: Batch) -> list[list[int]]:
    """The settings' own questions, or what stands before the first answer of some samples."""
    if settings.prompts:
        system = Message(Role.SYSTEM, SystemContent())
        return [render_for_completion([system, Message(Role.USER, text)], tokenizer) for text in settings.prompts]
    starts_N1, rows_R = np.asarray(batch.query_starts_N1), np.asarray(batch.logit_rows_R)
    first_N = rows_R[np.searchsorted(rows_R, starts_N1[:-1])]
    token_ids_T = np.asarray(batch.token_ids_T)
    found = [token_ids_T[start : last + 1].tolist() for start, last in zip(starts_N1[:-1], first_N, strict=True)]
    # Of a pair both sides have the same.
    return [list(prompt) for prompt in dict.fromkeys(map(tuple, found))][:_NUM_QUESTIONS]


def _last_row(token_ids: Sequence[int]) -> Batch:
    """One sequence as a batch that asks for its last row."""
    num_tokens = len(token_ids)
    empty = np.empty((1, 0), np.int32)
    return Batch(
        token_ids_T=np.array(token_ids, np.int32),
        positions_T=np.arange(num_tokens, dtype=np.int32),
        query_starts_N1=np.array([0, num_tokens], np.int32),
        key_lengths_N=np.array([num_tokens], np.int32),
        full_table_NB=empty,
        window_table_NB=empty,
        logit_rows_R=np.array([num_tokens - 1], np.int32),
    )


def _shown(text: str) -> str:
    return text[-100:].replace("\n", " ")
