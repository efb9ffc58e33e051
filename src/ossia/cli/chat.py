"""`ossia chat`: a conversation in the terminal, or the lines of a pipe answered one by one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ossia.cli import options

if TYPE_CHECKING:
    from ossia.cli.chat_loop import ToolSet
    from ossia.config import Config
    from ossia.responses.loop import Model
    from ossia.responses.toolbox import Toolboxes


System = Annotated[str | None, typer.Option(help="What the developer asks of the model, in every turn.")]
Tools = Annotated[
    str,
    typer.Option(
        help="Tools that the model may call, with commas between: python, browser, apply_patch, mcp (every server "
        "of the settings), mcp:NAME."
    ),
]
PatchRoot = Annotated[
    Path, typer.Option(help="The folder whose files apply_patch may change; you are asked before each change.")
]
Load = Annotated[Path | None, typer.Option(help="Go on with a conversation that /save has written.")]
WhenFull = Annotated[
    Literal["ask", "drop", "compact"],
    typer.Option(help="When the context is full: ask, forget the oldest turns, or let the model sum them up."),
]


def chat(
    model: options.Model = None,
    effort: options.Effort = "medium",
    system: System = None,
    show_reasoning: options.ShowReasoning = False,
    tools: Tools = "",
    patch_root: PatchRoot = Path("."),
    browser: options.Browser = None,
    browser_root: options.BrowserRoot = None,
    python_sandbox: options.PythonSandbox = None,
    unsafe_python: options.UnsafePython = False,
    load: Load = None,
    when_full: WhenFull = "ask",
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    adapter: options.Adapter = None,
    date: options.Date = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    dense: options.Dense = None,
    kv: options.KeysAndValues = None,
    kv_memory: options.KvMemory = None,
    gpu_memory: options.GpuMemory = None,
    max_context: options.MaxContext = None,
) -> None:
    """Talk with a model in the terminal.

    /help tells the commands. Without a terminal every line of standard input is a question, answered in plain text:
    `echo "Why is the sky blue?" | ossia chat --model gpt-oss-20b`.

    Example: ossia chat --model gpt-oss-20b --effort low
    """
    settings = options.settings_of(locals(), without=("tools",))
    # The engine and its libraries take a part of a second to import; `ossia --help` does not wait for them.
    from ossia.cli.serve import answering, open_tools
    from ossia.config import data_folder
    from ossia.engine import AsyncEngine
    from ossia.local import LocalModel, checked_date

    settings, adapter_name = options.with_adapter(settings, adapter)
    current_date = checked_date(date) if date is not None else None
    names = _with_servers([name.strip() for name in tools.split(",") if name.strip()], settings)
    wanted = list(dict.fromkeys(one.partition(":")[0] for one in names if one != "apply_patch"))
    boxes = open_tools(settings, wanted, unsafe_python) if wanted else None
    local = LocalModel.open(settings)
    name = adapter_name or Path(settings.model).name.removesuffix(".gguf")
    engine = AsyncEngine(local.engine)
    try:
        code = converse(
            answering(local, name, engine.through(adapter_name) if adapter_name else engine, settings),
            data_folder=data_folder(),
            shows_reasoning=show_reasoning,
            when_full=when_full,
            load=load,
            tools=names,
            boxes=boxes,
            patch_root=patch_root,
            effort=effort,
            instructions=system,
            max_tokens=max_tokens,
            sampling=options.sampling(temperature, top_p),
            seed=seed,
            current_date=current_date,
        )
    finally:
        engine.close()
    raise typer.Exit(code)


def _with_servers(names: Sequence[str], settings: Config) -> list[str]:
    """The tools that are meant, each server of the settings by its name. Raises ConfigError."""
    from ossia.errors import ConfigError

    meant: list[str] = []
    for one in names:
        kind, _, label = one.partition(":")
        if kind == "mcp" and not settings.mcp:
            raise ConfigError(f"--tools names {one!r}, and the settings have no server; expected a table [mcp.NAME]")
        if one == "mcp":
            meant += [f"mcp:{label}" for label in settings.mcp]
        elif kind == "mcp" and label not in settings.mcp:
            known = ", ".join(f"mcp:{label}" for label in settings.mcp)
            raise ConfigError(f"--tools names {one!r}; expected one of the settings' servers: {known}")
        elif kind == "mcp" or one in ("python", "browser", "apply_patch"):
            meant.append(one)
        else:
            raise ConfigError(f"--tools names {one!r}; expected some of: python, browser, apply_patch, mcp, mcp:NAME")
    return list(dict.fromkeys(meant))


def converse(
    model: Model,
    *,
    data_folder: Path,
    shows_reasoning: bool = False,
    when_full: Literal["ask", "drop", "compact"] = "ask",
    load: Path | None = None,
    tools: Sequence[str] = (),
    patch_root: Path = Path("."),
    **settings: Any,
) -> int:
    """Chat with ``model`` on this process's terminal or pipes; the exit code. ``settings`` are `ChatSession`'s."""
    from rich.console import Console

    from ossia.cli.chat_input import Input, LineInput, PipeInput, TerminalInput, private_file
    from ossia.cli.chat_loop import COMMANDS, PATCHES, ChatLoop
    from ossia.cli.chat_screen import PlainScreen, RichScreen, Screen
    from ossia.cli.chat_session import ChatSession
    from ossia.errors import InputError
    from ossia.tools.apply_patch import ApplyPatch
    from ossia.tools.patch_files import PatchFolder

    session = ChatSession(model, **settings)
    if load is not None:
        session.load(load)
    is_typed = sys.stdin is not None and sys.stdin.isatty()
    is_drawn = is_typed and sys.stdout.isatty() and not Console().is_dumb_terminal
    screen: Screen
    if is_drawn:
        screen = RichScreen(session.meter, shows_reasoning=shows_reasoning)
    else:
        screen = PlainScreen(session.meter, shows_reasoning=shows_reasoning)
    source: Input
    if is_drawn:
        # A conversation is private, and so is what was asked in it.
        history = private_file(data_folder / "chat_history")
        if history is None:
            screen.note(f"{data_folder}: cannot be written; what is typed is not kept for the next time")
        source = TerminalInput(history, [f"/{name}" for name in COMMANDS], lambda: loop.status())
    else:
        source = LineInput() if is_typed else PipeInput()
    known = _known_tools(tools, session.boxes)
    # Where nobody can be asked, nothing is changed.
    if source.is_interactive:
        session.patcher = ApplyPatch(PatchFolder(patch_root), approve=lambda plan: loop.approve(plan))
        known["apply_patch"] = PATCHES
    elif "apply_patch" in tools:
        raise InputError("apply_patch asks before each change, and there is no terminal to ask at; leave it out")
    loop = ChatLoop(session, source, screen, when_full=when_full, tools=known, tools_on=tools, file=load)
    session.approve = loop.approve_call
    if source.is_interactive:
        screen.note(f"{model.name} · /help tells the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    return loop.run()


def _known_tools(names: Sequence[str], boxes: Toolboxes | None) -> dict[str, ToolSet]:
    """What the tools of ``names`` are, but for apply_patch."""
    from ossia.cli.chat_loop import BROWSER, PYTHON, server_tools

    known = {name: tool for name, tool in (("python", PYTHON), ("browser", BROWSER)) if name in names}
    for label, server in boxes.servers.items() if boxes is not None else ():
        if f"mcp:{label}" in names:
            known[f"mcp:{label}"] = server_tools(label, is_asked=server.approval == "always")
    return known
