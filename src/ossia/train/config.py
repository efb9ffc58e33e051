"""Settings of a training run: a recipe (a TOML file) with flags on top. Imports nothing heavy.

    model = "gpt-oss-20b"
    data = "conversations.jsonl"
    out = "runs/mine"
    rank = 16

A setting is one field with one sentence, which `ossia train sft --help` prints. Its metadata says what values it may
have, and whether a run may be resumed with another one: what cannot change a number of the loss curve may change.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ossia.config import did_you_mean
from ossia.errors import ConfigError

Settings = TypeVar("Settings", bound="TrainConfig")


def setting(
    default: Any,
    text: str,
    *,
    group: str = "",
    low: float | None = None,
    high: float | None = None,
    is_free: bool = False,
    is_required: bool = False,
) -> Any:
    """A field: its default, its sentence, where the help shows it, its bounds (inclusive), whether it may change."""
    return dataclasses.field(
        default=default,
        metadata={
            "text": text,
            "group": group,
            "low": low,
            "high": high,
            "is_free": is_free,
            "is_required": is_required,
        },
    )


_lora = partial(setting, group="LoRA")
_data = partial(setting, group="Data")
_course = partial(setting, group="Course")
_optimizer = partial(setting, group="Optimiser")
_machine = partial(setting, group="Machine")
_result = partial(setting, group="Trying the result")
_record = partial(setting, group="Checkpoints and curves")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What every method of training shares."""

    model: str = setting("", "Checkpoint to begin with: a folder, or a name such as gpt-oss-20b.", is_required=True)
    out: str = setting("", "Folder of the run: checkpoints, metrics, result.", is_free=True, is_required=True)

    begin_with: str = setting("", "Full training: folder of a run with whose last weights to begin, not the model's.")
    trainable: Literal["lora", "full"] = setting("lora", "Train small matrices beside the weights, or the weights.")
    rank: int = _lora(16, "Rank of a pair beside attention, router and embeddings.", low=1, high=4096)
    expert_rank: int = _lora(4, "Rank of the pair beside each expert.", low=1, high=4096)
    alpha: float = _lora(32.0, "The product of the pair is scaled by alpha / rank.", low=0)
    dropout: float = _lora(0.0, "Share of a pair's inputs that is dropped.", low=0, high=0.99)
    targets: tuple[str, ...] = _lora(
        ("q", "k", "v", "o", "experts"), "What gets a pair: q k v o experts router embedding unembedding."
    )

    fake_quant: bool = setting(
        False,
        "Compute with what MXFP4 keeps of the trained experts, so that nothing is lost when they are exported.",
    )

    seed: int = _course(0, "Order of the data, first values, dropout: the same seed gives the same run.", low=0)
    epochs: int = _course(1, "How often the data is gone through.", low=0)
    steps: int = _course(0, "Optimiser steps, in place of epochs; 0 goes by epochs.", low=0)
    step_tokens: int = _course(
        0, "Tokens that one optimiser step sees, gathered over passes; 0 makes each pass a step.", low=0
    )

    optimizer: Literal["adamw", "muon"] = _optimizer(
        "adamw", "AdamW; or Muon for inner matrices and AdamW for the rest."
    )
    learning_rate: float | None = _optimizer(
        None, "Highest learning rate; by default 2e-4 for LoRA and 2e-5 for full training.", low=0
    )
    weight_decay: float = _optimizer(0.0, "Decay of matrices; vectors never decay.", low=0)
    beta1: float = _optimizer(0.9, "AdamW: memory of the gradient.", low=0, high=0.99999)
    beta2: float = _optimizer(0.95, "AdamW: memory of the squared gradient.", low=0, high=0.999999)
    epsilon: float = _optimizer(1e-8, "AdamW: floor of the divisor.", low=0)
    momentum: float = _optimizer(0.95, "Muon: memory of the gradient.", low=0, high=0.99999)
    schedule: Literal["cosine", "wsd", "linear", "constant"] = _optimizer(
        "cosine", "How the learning rate falls; wsd holds it and falls at the end."
    )
    warmup: float = _optimizer(0.03, "Share of the steps in which the learning rate rises.", low=0, high=1)
    decay: float = _optimizer(0.2, "wsd: share of the steps in which the learning rate falls.", low=0, high=1)
    final_rate: float = _optimizer(0.1, "Learning rate of the last step, as a share of the highest.", low=0, high=1)
    weight_mean: float | None = _optimizer(
        None,
        "What is kept is a mean of the weights of all steps, step N counting as N to this power; by default those of "
        "the last step.",
        low=0,
    )
    clip: float = _optimizer(1.0, "Largest norm of a step's gradient, which is scaled down to it; 0 for any.", low=0)
    router_balance: float | None = _optimizer(
        None, "Weight of the loss that spreads tokens over experts; by default 1e-3 where routers train, else 0.", low=0
    )
    max_skipped: int = _optimizer(
        10, "Steps without a finite gradient, in a row, that end the run.", low=1, is_free=True
    )

    device: str = _machine("auto", "Where to train: cpu, cuda, cuda:1; auto takes a GPU if there is one.", is_free=True)
    replicate: bool = _machine(
        False,
        "Each of several processes has the whole model, and only gradients travel: for small models.",
        is_free=True,
    )
    threads: int = _machine(0, "Threads on the CPU; 0 takes all cores.", low=0, is_free=True)
    precision: Literal["auto", "float32", "bfloat16"] = _machine(
        "auto", "Arithmetic of matrix products; auto is bfloat16 on a GPU. Softmax, router, norms stay float32."
    )
    recompute: bool = _machine(True, "Compute a layer's inner values again in the backward pass, to save memory.")

    save_every: int = _record(100, "Steps between checkpoints; 0 saves at the end alone.", low=0, is_free=True)
    keep: int = _record(2, "Newest checkpoints that are kept, besides the best.", low=1, is_free=True)
    eval_every: int = _record(50, "Steps between evaluations on held-out data; 0 for none.", low=0)
    patience: int = _record(0, "Evaluations without a better loss that end the run; 0 for no early end.", low=0)
    tensorboard: bool = _record(False, "Also write curves for TensorBoard, into OUT/tensorboard.", is_free=True)
    wandb: str = _record("", "Also send curves to this project of Weights & Biases.", is_free=True)

    @property
    def highest_rate(self) -> float:
        """The learning rate that the schedule scales."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.trainable == "lora" else 2e-5

    @property
    def balance_weight(self) -> float:
        """Weight of the router's balance loss; a checkpoint's config.json has no say in it."""
        if self.router_balance is not None:
            return self.router_balance
        return 1e-3 if self.trainable == "full" or "router" in self.targets else 0.0

    def check(self) -> None:
        """Raise ConfigError for settings that contradict each other."""
        for field in dataclasses.fields(self):
            if field.metadata["is_required"] and not getattr(self, field.name):
                raise ConfigError(f"{field.name} is not set; give it in the recipe, or as {_flag(field.name)}")
        if not self.steps and not self.epochs:
            raise ConfigError("steps and epochs are both 0; one of them says how long to train")
        if self.begin_with and self.trainable != "full":
            raise ConfigError(
                "begin_with is for trainable = full; with LoRA export the earlier run and give it as model"
            )
        if self.patience and not self.eval_every:
            raise ConfigError(f"patience is {self.patience} and eval_every 0: expected evaluations for it to count")
        if self.trainable == "lora" and not self.targets:
            raise ConfigError("targets is empty; LoRA needs something to train, such as q,k,v,o,experts")


@dataclass(frozen=True, slots=True)
class DataSettings(TrainConfig):
    """What methods share that learn from files; see `ossia.train.data.DataConfig`."""

    data: tuple[str, ...] = _data((), "JSONL files, or folders of them, to learn from.", is_required=True)
    validation: tuple[str, ...] = _data((), "Files of held-out rows; without them validation_share counts.")
    validation_share: float = _data(
        0.0,
        "Share of the rows of data that is held out, by a hash of each; none where there are validation files.",
        low=0,
        high=0.9,
    )
    eval_tokens: int = _data(65_536, "Most tokens of held-out rows that an evaluation reads.", low=1)
    format: Literal["auto", "harmony", "openai", "sharegpt"] = _data("auto", "Format of the rows.")
    train: str = _data(
        "all", "What is trained: all, analysis, commentary, final, calls or calls:PATTERN, each with =WEIGHT."
    )
    turns: Literal["all", "last"] = _data("all", "Which answers of a conversation are trained.")
    effort: str = _data("medium", "Reasoning effort of rows that name none: one, or shares such as low=1,high=2.")
    current_date: str = _data("2025-01-01..2026-12-31", "Date that the model is told, or a range of dates.")
    max_tokens: int = _data(4096, "Most tokens of a sample.", low=2)
    pass_tokens: int = _data(0, "Tokens that are packed into one pass; 0 takes max_tokens.", low=0)
    overlong: Literal["refuse", "skip", "cut"] = _data(
        "refuse", "What becomes of a longer sample: an error, left out, or its oldest turns left out."
    )
    packing: Literal["best_fit", "buckets", "none"] = _data("best_fit", "How samples share a pass.")
    skip_bad_rows: bool = _data(
        False, "Count rows that cannot be used and pass them by; otherwise the first is an error."
    )
    buffer_rows: int = _data(4096, "Rows that are held at once to be shuffled and packed.", low=1)
    prompts: tuple[str, ...] = _result(
        (), "Questions that the result is asked; by default some of the rows'.", is_free=True
    )
    prompt_tokens: int = _result(48, "Most tokens of each of its answers; 0 asks nothing.", low=0, is_free=True)

    @property
    def tokens_of_pass(self) -> int:
        """Most tokens that go through the model at once."""
        return self.pass_tokens or self.max_tokens

    def check(self) -> None:
        TrainConfig.check(self)
        if self.tokens_of_pass < self.max_tokens:
            raise ConfigError(
                f"pass_tokens is {self.pass_tokens} and max_tokens {self.max_tokens}: a sample must fit into a pass"
            )
        if self.patience and not self.has_validation:
            raise ConfigError("patience needs held-out rows: give validation files, or a validation_share")

    @property
    def has_validation(self) -> bool:
        """Whether any rows are held out."""
        return bool(self.validation) or self.validation_share > 0


@dataclass(frozen=True, slots=True)
class SftConfig(DataSettings):
    """Supervised fine-tuning: answers are to become likely."""


@dataclass(frozen=True, slots=True)
class DpoConfig(DataSettings):
    """Direct preference optimisation: of two answers the better one is to become the likelier one."""

    beta: float = setting(0.1, "How dearly it is paid to leave the model that training began with.", low=1e-6)
    smoothing: float = setting(0.0, "Share of pairs that are taken to be the wrong way round.", low=0, high=0.5)
    sft_weight: float = setting(0.0, "Weight of the better answer's likelihood for each token, besides.", low=0)

    @property
    def highest_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 5e-6 if self.trainable == "lora" else 5e-7


def read_settings(kind: type[Settings], recipe: str | Path | None, flags: Mapping[str, Any]) -> Settings:
    """The recipe's settings with ``flags`` on top; a flag that is None was not given.

    Raises ConfigError, naming the recipe or flag, for an unknown setting, a value that does not fit, a recipe that
    cannot be read, and settings that contradict each other.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in (_read_recipe(Path(recipe)) if recipe is not None else {}).items():
        if name not in fields:
            raise ConfigError(f"{recipe}: unknown setting {name!r}; {did_you_mean(name, fields)}", param=name)
        values[name] = _convert(f"{recipe}: {name}", value, hints[name], fields[name].metadata)
    for name, value in flags.items():
        if name not in fields:
            raise ConfigError(f"unknown setting {name!r}; {did_you_mean(name, fields)}", param=name)
        if value is not None:
            values[name] = _convert(_flag(name), value, hints[name], fields[name].metadata)
    settings = kind(**values)
    settings.check()
    return settings


def as_dict(settings: TrainConfig) -> dict[str, Any]:
    """Every setting, as JSON can hold it."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in ((field.name, getattr(settings, field.name)) for field in dataclasses.fields(settings))
    }


def changed_settings(before: Mapping[str, Any], settings: TrainConfig) -> list[str]:
    """What keeps a run that was begun with ``before`` from being resumed, one phrase for each setting.

    A setting that there was none of then had its default: what it changes was not done.
    """
    now, before = as_dict(settings), as_dict(type(settings)()) | dict(before)
    free = {field.name for field in dataclasses.fields(settings) if field.metadata["is_free"]}
    names = dict.fromkeys([*now, *before])
    return [
        f"{name} was {_shown(before, name)}, now {_shown(now, name)}"
        for name in names
        if name not in free and _shown(before, name) != _shown(now, name)
    ]


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "not known"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such recipe") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def _convert(source: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """A value of the setting's type; ``source`` opens the error's message."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        [hint] = [one for one in get_args(hint) if one is not type(None)]
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{source} is {value!r}; expected one of: {', '.join(get_args(hint))}")
    if hint == tuple[str, ...]:
        return _texts(source, value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number and math.isfinite(value):
        return _within(source, float(value), metadata)
    if hint is int and is_number and value == int(value):
        return _within(source, int(value), metadata)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    raise ConfigError(f"{source} is {value!r}; expected {expected}")


def _texts(source: str, value: Any) -> tuple[str, ...]:
    """Several texts: a list in the recipe, or one text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"{source} is {value!r}; expected a list of texts, or a text with commas")
    return tuple(part.strip() for part in parts if part.strip())


def _within(source: str, value: Any, metadata: Mapping[str, Any]) -> Any:
    low, high = metadata["low"], metadata["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"{low} or more" if high is None else f"{low} to {high}"
        raise ConfigError(f"{source} is {value}; expected {bounds}")
    return value
