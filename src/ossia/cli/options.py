"""Options that several commands share: which model, and how it is run. Each is a field of `ossia.config.Config`.

An option that is not given is None, so that the settings file and OSSIA_* variables keep their say.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Model = Annotated[
    str, typer.Option("--model", "-m", help="A checkpoint folder, a .gguf file, or a name such as gpt-oss-20b.")
]
Backend = Annotated[
    Literal["cpu", "reference"] | None, typer.Option(help="C++ kernels, or slow and readable numpy. [default: cpu]")
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
MaxContext = Annotated[
    int | None, typer.Option(min=0, help="Most tokens of prompt and answer; 0 for what fits. [default: 0]")
]
