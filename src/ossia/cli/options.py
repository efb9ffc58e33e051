"""Options that several commands share: which model, how it is run, and with which tools.

An option that is not given is None or False, so that the settings file and OSSIA_* variables keep their say.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from ossia.config import Config

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="A checkpoint folder, a .gguf file, or a name such as gpt-oss-20b.")
]
Effort = Annotated[Literal["low", "medium", "high"], typer.Option(help="How long the model thinks before it answers.")]
ShowReasoning = Annotated[
    bool, typer.Option("--show-reasoning", help="Show the chain of thought, which is not written for end users.")
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="End each answer after this many tokens, thoughts included.")
]
Seed = Annotated[
    int | None, typer.Option(min=-(2**62), max=2**62, help="The same seed gives the same answers to the same prompts.")
]
Backend = Annotated[
    Literal["cpu", "gpu", "reference"] | None,
    typer.Option(help="C++ kernels, Triton kernels on an NVIDIA GPU, or slow and readable numpy. [default: cpu]"),
]
Threads = Annotated[int | None, typer.Option(min=0, help="Threads of the CPU backend; 0 for all cores. [default: 0]")]
Dense = Annotated[
    Literal["q8", "bf16"] | None,
    typer.Option(help="Attention and unembedding in 8 bits, or exactly as published. [default: q8]"),
]
KeysAndValues = Annotated[
    Literal["bf16", "q8"] | None, typer.Option(help="How keys and values are kept. [default: bf16]")
]
KvMemory = Annotated[str | None, typer.Option(help="Most memory for keys and values, such as 2GiB. [default: 1GiB]")]
GpuMemory = Annotated[
    str | None, typer.Option(help="Most of the GPU's memory to take, such as 16GB. [default: nearly all]")
]
Tp = Annotated[
    int | None,
    typer.Option(min=0, help="GPUs that share the model, a process of torchrun's for each. [default: all it started]"),
]
MaxContext = Annotated[
    int | None, typer.Option(min=0, help="Most tokens of prompt and answer; 0 for what fits. [default: 0]")
]
Adapter = Annotated[
    str | None, typer.Option(help="A LoRA adapter to answer with: its folder, or its name in the settings file.")
]
AdapterMemory = Annotated[str | None, typer.Option(help="Most memory for adapters, such as 1GiB. [default: 2GiB]")]
Date = Annotated[str | None, typer.Option(help="The date that the model is told, YYYY-MM-DD; today's by default.")]
Browser = Annotated[
    str | None, typer.Option(help="Where the browser searches: local:FOLDER, searxng:URL, brave, exa, youcom, tavily.")
]
BrowserRoot = Annotated[Path | None, typer.Option(help="Let the browser search this folder, and reach no network.")]
PythonSandbox = Annotated[
    str | None, typer.Option(help="What confines python: bubblewrap, landlock, docker:IMAGE ... [default: auto]")
]
UnsafePython = Annotated[bool, typer.Option("--unsafe-python", help="Run the model's code with no sandbox at all.")]

Temperature = Annotated[
    float | None,
    typer.Option(min=0, help="0 always takes the likeliest token. [default: the checkpoint's, else 1]"),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Sample among the likeliest tokens that reach this share. [default: the checkpoint's, else 1]",
    ),
]


def settings_of(options: Mapping[str, Any], *, without: Collection[str] = ()) -> Config:
    """The settings in force for a command that was given ``options``, its parameters by name.

    A parameter that is called as a setting, and not named by ``without``, is that setting; True stands for "yes", and
    ``browser_root`` for a browser over a folder. Raises ConfigError.
    """
    from ossia import config
    from ossia.errors import ConfigError

    names = {field.name for field in dataclasses.fields(config.Config)} - set(without)
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    flags = {name: "yes" if value is True else value for name, value in given.items() if name in names}
    if "browser_root" in given:
        if "browser" in given:
            raise ConfigError("--browser and --browser-root exclude each other; give one")
        flags["browser"] = f"local:{given['browser_root']}"
    return config.load(flags)


def sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Those of the two that were given; the rest is the checkpoint's to say."""
    asked = {"temperature": temperature, "top_p": top_p}
    return {name: value for name, value in asked.items() if value is not None}


def with_adapter(settings: Config, adapter: str | None) -> tuple[Config, str | None]:
    """Settings that load the adapter of ``--adapter`` and no other, and the name that it then has."""
    if adapter is None:
        return dataclasses.replace(settings, adapters={}), None
    if adapter in settings.adapters:
        return dataclasses.replace(settings, adapters={adapter: settings.adapters[adapter]}), adapter
    name = Path(os.path.expanduser(adapter)).resolve().name or "adapter"
    return dataclasses.replace(settings, adapters={name: adapter}), name
