"""Settings of the methods that learn from what the model itself samples. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ossia.config import parse_size
from ossia.errors import ConfigError
from ossia.harmony import Effort
from ossia.train.config import TrainConfig, setting

_rollout = partial(setting, group="Rollouts")
_engine = partial(setting, group="Engine")
_objective = partial(setting, group="Objective")
_teacher = partial(setting, group="Teacher")


@dataclass(frozen=True, slots=True)
class RolloutSettings(TrainConfig):
    """What such methods share: exercises, and the engine that does them."""

    task: tuple[str, ...] = _rollout(
        (), "Tasks: names, or module:Class of your own, each with =WEIGHT.", is_required=True
    )
    task_option: tuple[str, ...] = _rollout((), "Arguments of a single task, each name=value.")
    efforts: str = _rollout("", "How often each effort is asked for, such as low=1,high=2; empty is up to the tasks.")
    prompts: int = _rollout(32, "Prompts of one step; offline, answers of the teacher.", low=1)
    group: int = _rollout(8, "Rollouts of each prompt.", low=1)
    rollout_tokens: int = _rollout(512, "Tokens that one rollout may sample, all turns together.", low=1)
    max_calls: int = _rollout(8, "Calls of tools in one rollout.", low=0)
    tool_seconds: float = _rollout(30.0, "Seconds that one call may take.", low=0)
    temperature: float = _rollout(1.0, "Temperature of the draws, and of the trained probabilities.", low=1e-3)
    grammar: bool = _rollout(False, "Exclude malformed messages, unknown tools and answers off their schema.")
    python_sandbox: str = _rollout("auto", "What confines the python tool: bubblewrap, landlock, docker:IMAGE ...")
    unsafe_python: bool = _rollout(False, "Run the model's code with no sandbox at all.")
    max_python: int = _rollout(8, "Sandboxes of the python tool that live at once.", low=1, is_free=True)
    show_rollouts: int = _rollout(
        4, "Rollouts of each step that are written as text, into OUT/rollouts.", low=0, is_free=True
    )
    pass_tokens: int = _rollout(4096, "Tokens that are packed into one pass; a longer rollout goes alone.", low=2)
    eval_prompts: int = _rollout(64, "Held-out prompts of an evaluation.", low=1)

    backend: Literal["cpu", "reference"] = _engine("cpu", "What samples: C++ kernels, or slow and readable numpy.")
    dense: Literal["q8", "bf16"] = _engine(
        "bf16", "Attention and unembedding while sampling: as they are, or faster and less alike in 8 bits."
    )
    kv: Literal["bf16", "q8"] = _engine("bf16", "How keys and values are kept while sampling.")
    kv_memory: str = _engine("1GiB", "Most memory for keys and values.", is_free=True)
    concurrent: int = _engine(64, "Rollouts that go on at once.", low=1, is_free=True)
    replay: bool = _engine(True, "Train with the experts that the engine chose, token by token.")

    @property
    def kv_memory_bytes(self) -> int:
        return parse_size(self.kv_memory)

    @property
    def effort_weights(self) -> dict[Effort, float] | None:
        return by_effort("efforts", self.efforts) or None

    @property
    def options_of_task(self) -> dict[str, object]:
        """Arguments of a single task."""
        return read_options(self.task_option)

    def check(self) -> None:
        TrainConfig.check(self)
        try:
            parse_size(self.kv_memory)
        except ValueError:
            raise ConfigError(f"kv_memory is {self.kv_memory!r}; expected a size such as 2GiB") from None
        by_effort("efforts", self.efforts)
        _ = self.options_of_task
        if not self.steps:
            raise ConfigError("steps is 0; say how many steps to make: there is no data that could end")
        if self.epochs != 1:
            raise ConfigError(f"epochs is {self.epochs}; leave it out: there is no data to go through, steps counts")

    def check_sampled(self) -> None:
        """Raise ConfigError for what the policy that samples could not have."""
        if self.dropout:
            raise ConfigError(f"dropout is {self.dropout}; expected 0: the policy that sampled has none")
        if self.weight_mean is not None:
            raise ConfigError(
                f"weight_mean is {self.weight_mean}; expected none: what is sampled, and measured, has the last weights"
            )
        if self.fake_quant and self.trainable == "lora":
            raise ConfigError(
                "fake_quant is on; expected it off with LoRA: the engine that samples adds pairs beside the weights, "
                "where nothing rounds them. Use trainable = full"
            )


@dataclass(frozen=True, slots=True)
class RlConfig(RolloutSettings):
    """Reinforcement: what is rewarded more than the rest of its group becomes likelier."""

    steps: int = setting(100, "Steps: rollouts, then what is learned of them.", group="Course", low=1)
    advantage: Literal["mean", "normalized"] = _objective(
        "mean", "Reward less the group's mean; normalized divides by the group's standard deviation as well."
    )
    average: Literal["token", "sequence"] = _objective("token", "What counts alike: every token, or every rollout.")
    ratio: Literal["token", "sequence"] = _objective(
        "token", "What is compared with the old policy: tokens, or whole rollouts (GSPO; clips of about 3e-4)."
    )
    clip_low: float = _objective(0.2, "How far a ratio may fall before its gradient is cut.", low=0, high=1)
    clip_high: float = _objective(0.28, "How far a ratio may rise before its gradient is cut.", low=0)
    updates: int = _objective(1, "Optimiser steps that share the rollouts of one step between them.", low=1)
    reuse: int = _objective(1, "Times that the rollouts of one step are gone through.", low=1)
    redraws: int = _objective(0, "Times that groups of equal reward give way to other prompts in one step.", low=0)
    correction: Literal["token", "sequence", "none"] = _objective(
        "token", "What is weighed for the engine's probabilities not being the trainer's."
    )
    correction_cap: float = _objective(2.0, "Largest weight of that correction.", low=1)
    kl: float = _objective(0.0, "Price of the divergence from the model that training began with.", low=0)
    length_cost: str = _objective(
        "", "What rollout_tokens tokens cost at each effort, such as low=0.3,medium=0.1; less costs its share."
    )
    overlong: int = _objective(
        0, "Last tokens of rollout_tokens over which a penalty grows from 0 to 1 (DAPO); 0 for none.", low=0
    )
    drop_truncated: bool = _objective(False, "Learn nothing from rollouts that a limit has ended.")

    @property
    def highest_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-5 if self.trainable == "lora" else 1e-6

    @property
    def is_on_policy(self) -> bool:
        """Whether each rollout is learned from once, before the policy has moved."""
        return self.updates == self.reuse == 1

    def check(self) -> None:
        RolloutSettings.check(self)
        by_effort("length_cost", self.length_cost)
        if self.group < 2:
            raise ConfigError(f"group is {self.group}; expected at least 2, since rewards are compared in a group")
        if self.updates > self.prompts:
            raise ConfigError(f"updates is {self.updates} and prompts {self.prompts}; each update needs a prompt")
        self.check_sampled()


@dataclass(frozen=True, slots=True)
class DistillConfig(RolloutSettings):
    """Distillation: a student learns a teacher's probabilities."""

    task: tuple[str, ...] = _rollout(
        (), "Tasks that prompts are drawn from: names, or module:Class of your own, each with =WEIGHT."
    )
    steps: int = setting(100, "Optimiser steps.", group="Course", low=1)
    teacher: str = _teacher("", "The teacher: a checkpoint, a name, or http://HOST:PORT/v1 of a server.")
    teacher_model: str = _teacher("", "The server's name for the teacher; empty takes the only one it has.")
    teacher_key: str = _teacher("", "Name of the environment variable that holds the server's API key.", is_free=True)
    method: Literal["offline", "on_policy"] = _teacher(
        "offline", "Learn from the teacher's own answers, or from the student's as the teacher sees them."
    )
    teachings: str = _teacher("", "Folder of the teacher's answers; empty is OUT/teachings.")
    samples: int = _teacher(
        1000, "Answers of the teacher to collect and learn from, each to a prompt drawn for it.", low=1
    )
    shard: int = _teacher(256, "Answers in one file of the teachings.", low=1)
    top: int = _teacher(20, "Likeliest tokens of the teacher that are learned at each place; the rest is one.", low=1)
    collect_only: bool = _teacher(False, "Collect the teacher's answers, and train nothing.", is_free=True)
    min_reward: float = _teacher(
        0.0, "Least reward of a teacher's answer that is learned from, as its task judges it.", low=0, high=1
    )
    estimate: Literal["top", "sampled"] = _objective(
        "top", "On policy, the reverse KL over the teacher's likeliest tokens, or of the sampled one alone."
    )

    @property
    def highest_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-4 if self.trainable == "lora" else 1e-5

    def check(self) -> None:
        RolloutSettings.check(self)
        if not self.teacher and not (self.method == "offline" and self.teachings):
            raise ConfigError("teacher is not set; give a checkpoint or a server's address, or a folder of teachings")
        if not self.task and (self.teacher or self.method == "on_policy"):
            raise ConfigError("task is not set; give it in the recipe, or as --task: prompts are drawn from tasks")
        if self.method == "on_policy" and self.temperature != 1:
            raise ConfigError(
                f"temperature is {self.temperature}; on policy the teacher is compared at 1, so expected 1"
            )
        if self.method == "on_policy":
            self.check_sampled()


def by_effort(name: str, text: str) -> dict[Effort, float]:
    """Numbers by effort from "low=1,high=2". Raises ConfigError."""
    numbers: dict[Effort, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        effort, equals, number = part.partition("=")
        try:
            value = float(number) if equals else -1.0
            known = Effort(effort.strip())
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ConfigError(
                f"{name} holds {part!r}; expected efforts and numbers from 0 on, such as low=1,medium=2", param=name
            )
        numbers[known] = value
    return numbers


def read_options(texts: Sequence[str]) -> dict[str, object]:
    """Arguments of a task from "name=value": numbers and true or false where they look like it. Raises ConfigError."""
    options: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"task_option holds {text!r}; expected name=value", param="task_option")
        options[name] = _value(value)
    return options


def _value(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
