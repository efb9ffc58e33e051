"""`ossia train`: fine-tune a model. A recipe (TOML) says how; every setting is a flag as well.

A method of training is a class of settings and a function; its command, with all flags and their help, is made of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from ossia.errors import UnavailableError
from ossia.train.config import DpoConfig, Settings, SftConfig, TrainConfig, read_settings

if TYPE_CHECKING:
    from ossia.train.run import Outcome

app = typer.Typer(help="Fine-tune a model; `recipes/` has examples.", no_args_is_help=True)

_INTERRUPTED = 130


def command(kind: type[Settings], train: Callable[..., Outcome], text: str) -> Callable[..., None]:
    """A command of ``train(settings, resume=..., say=...)`` with a flag for each setting of ``kind``."""

    def run(recipe: Path | None = None, resume: bool = False, **flags: Any) -> None:
        settings = read_settings(kind, recipe, flags)
        _require_torch()
        outcome = train(settings, resume=resume, say=_say)
        if outcome.is_interrupted:
            raise typer.Exit(_INTERRUPTED)

    hints = get_type_hints(kind)
    flags = {field.name: _flag(field, hints[field.name]) for field in dataclasses.fields(kind)}
    annotations: dict[str, Any] = {
        "recipe": Annotated[Path | None, typer.Argument(help="TOML file with settings; flags stand above it.")],
        "resume": Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")],
        **flags,
    }
    defaults = {"resume": False}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(n, keyword, default=defaults.get(n), annotation=a) for n, a in annotations.items()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = annotations
    run.__doc__ = text
    return run


def _flag(field: dataclasses.Field[Any], hint: Any) -> Any:
    """The option of a setting; None where it is not given, so that the recipe keeps its say."""
    if get_origin(hint) in (Union, types.UnionType):
        [hint] = [one for one in get_args(hint) if one is not type(None)]
    name = f"--{field.name.replace('_', '-')}"
    names = (f"{name}/--no-{field.name.replace('_', '-')}",) if hint is bool else (name,)
    if hint == tuple[str, ...]:
        hint = str
    shown = _shown(field.default)
    text = field.metadata["text"] + (f" [default: {shown}]" if shown else "")
    return Annotated[hint | None, typer.Option(*names, help=text, rich_help_panel=field.metadata["group"] or "Run")]


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(default)
    if isinstance(default, bool):
        return "on" if default else "off"
    return "" if default is None else str(default)


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UnavailableError("training needs PyTorch, which is not installed: pip install 'ossia[train]'") from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
