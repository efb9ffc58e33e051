"""Tasks by name: those that come with ossia, and `module:Class` of anyone's own.

    task = make("arithmetic", {"digits": 4})
    mix = make_mix(["arithmetic=2", "shouting:Shout"])

A name with a colon is imported, so such names come from whoever runs ossia.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ossia.errors import ConfigError
from ossia.harmony import Effort
from ossia.train.tasks.base import (
    SPLITS,
    VALID_REWARD,
    Draw,
    Instance,
    Reward,
    Split,
    Task,
    TaskMix,
    Transcript,
    conversation,
    draw_instance,
    gold_conversation,
    gold_conversation_of_turns,
    gold_conversations,
    is_held_out,
    namespaces,
)

__all__ = [
    "SPLITS",
    "TASKS",
    "VALID_REWARD",
    "Draw",
    "Instance",
    "Reward",
    "Split",
    "Task",
    "TaskMix",
    "Transcript",
    "conversation",
    "draw_instance",
    "gold_conversation",
    "gold_conversation_of_turns",
    "gold_conversations",
    "is_held_out",
    "make",
    "make_mix",
    "namespaces",
]

# Name -> where its class is; imported when it is asked for.
TASKS: Mapping[str, str] = {
    "about": "ossia.train.tasks.about:About",
    "arithmetic": "ossia.train.tasks.arithmetic:Arithmetic",
    "browsing": "ossia.train.tasks.browsing:Browsing",
    "calculator": "ossia.train.tasks.calculator:Calculator",
    "functions": "ossia.train.tasks.functions:FunctionCalls",
    "hierarchy": "ossia.train.tasks.hierarchy:Hierarchy",
    "policies": "ossia.train.tasks.policies:Policies",
    "python": "ossia.train.tasks.problems:PythonProblems",
    "structured": "ossia.train.tasks.structured:Structured",
    "sums": "ossia.train.tasks.sums:Sums",
}


def make(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of that name. Raises ConfigError for one that is not there, is no task, or refuses its options."""
    where = TASKS.get(name, name)
    module_name, colon, class_name = where.partition(":")
    if not colon or not class_name:
        known = ", ".join(sorted(TASKS))
        raise ConfigError(f"there is no task {name!r}; expected one of: {known}, or module:Class", param="task")
    if os.getcwd() not in sys.path and "" not in sys.path:
        # The command `ossia` does not look into the current folder by itself, as `python` does.
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"the task {name!r}: the module {module_name!r} cannot be imported: {error}", param="task"
        ) from None
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(
            f"the task {name!r}: {module_name} has no class {class_name} that is an ossia.train.tasks.Task",
            param="task",
        )
    try:
        task = found(**(options or {}))
    except TypeError as error:
        raise ConfigError(
            f"the task {name!r} cannot be made with {dict(options or {})}: {error}", param="task"
        ) from None
    if not task.name:
        raise ConfigError(f"the task {name!r} has no name; set `name` in its class", param="task")
    return task


def make_mix(
    names: Sequence[str],
    options: Mapping[str, Any] | None = None,
    efforts: Mapping[Effort, float] | None = None,
) -> TaskMix:
    """Tasks by name, each with a weight behind "=" where it is not 1; ``options`` go to a single task.

    Raises ConfigError.
    """
    if options and len(names) != 1:
        raise ConfigError(f"options of a task were given with {len(names)} tasks; expected one task", param="task")
    tasks: dict[Task, float] = {}
    for text in names:
        name, equals, weight = text.partition("=")
        try:
            share = float(weight) if equals else 1.0
        except ValueError:
            share = 0.0
        if not share > 0:
            raise ConfigError(f"the task {text!r}: expected a weight above 0 behind '='", param="task")
        tasks[make(name, options)] = share
    return TaskMix(tasks, efforts=efforts)
