"""Settings of a running ossia, layered: defaults < TOML file < OSSIA_* variables < command-line flags.

The only file that reads `os.environ`. The TOML file is the one named by OSSIA_CONFIG, else
`$XDG_CONFIG_HOME/ossia/config.toml` (`~/.config/ossia/config.toml`), and may be absent:

    model = "gpt-oss-20b"
    threads = 8
    kv_memory = "2GiB"

    [mcp.files]                                 # a server of tools that is started here
    command = "mcp-files"
    args = ["--folder", "/srv/files"]

    [mcp.tracker]                               # and one that is reached by HTTP
    url = "https://tracker.example.com/mcp"
    headers = { Authorization = "Bearer ${TRACKER_TOKEN}" }

    [adapters]                                  # LoRA adapters, by the names that clients choose them by
    polite = "/srv/adapters/polite"

`${NAME}` in a server's texts is the environment variable NAME, so that the file holds no secret.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ossia.errors import ConfigError


class Size(int):
    """A number of bytes, written as a whole number or with a unit: 512MiB, 2GiB, 1.5GB."""


class Port(int):
    """A number of a port, 0 to 65535."""


@dataclass(frozen=True, slots=True)
class McpServer:
    """A server of the Model Context Protocol: the table `[mcp.NAME]`, with either a command or a url."""

    command: str = ""
    """Program that is started and spoken to over its standard input and output."""
    args: tuple[str, ...] = ()
    """Arguments of the program."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment variables of the program, beside PATH, HOME and the like; it gets no others."""
    folder: str = ""
    """Folder that the program is started in; empty for the current one."""
    url: str = field(default="", repr=False)
    """Address of a server that speaks streamable HTTP."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Headers of every request to it, never shown or logged."""
    timeout_s: int = 60
    """Seconds that one call may take."""
    tools: tuple[str, ...] = ()
    """Names of the tools that are offered; empty for all."""
    approval: Literal["always", "never"] = "always"
    """Whether a person is asked before each call; a request may ask for more, and not for less."""


_ALL = Size(0)
_GIB = Size(1 << 30)
_2_GIB = Size(2 << 30)
_4_GIB = Size(4 << 30)
_32_MIB = Size(32 << 20)
_PORT = Port(8000)


EMBEDDED = "nano"
"""The demonstration that comes with ossia: a few million parameters with gpt-oss's architecture, `docs/nano.md`."""


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting, with its default."""

    model: str = EMBEDDED
    """Checkpoint to use: a folder, a .gguf file, or a name such as gpt-oss-20b; nano is the demonstration built in."""
    backend: Literal["cpu", "gpu", "reference"] = "cpu"
    """Where the arithmetic runs: C++ kernels, Triton kernels on an NVIDIA GPU, or the slow readable numpy."""
    threads: int = 0
    """Threads of the CPU backend; 0 takes every core that the process may use."""
    dense: Literal["q8", "bf16"] = "q8"
    """How the CPU backend holds attention and unembedding weights: 8-bit blocks, or exactly as published."""
    kv: Literal["bf16", "q8"] = "bf16"
    """How the CPU backend holds keys and values."""
    kv_memory: Size = _GIB
    """Most memory for keys and values, such as 2GiB, never exceeded; a GPU gives them all that it has left."""
    gpu_memory: Size = _ALL
    """Most of a GPU's memory to take, 0 for nearly all; experts beyond it, and beyond kv_memory, stay with the host."""
    tp: int = 0
    """GPUs that share one model, each with a process of torchrun's; 0 takes as many as torchrun started."""
    max_context: int = 0
    """Longest prompt and answer together, in tokens; 0 takes what the model allows and kv_memory holds."""
    draft_tokens: int = 15
    """Tokens computed ahead where an answer seems to repeat what stands in it or its prompt; 0 for none."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """LoRA adapters by name, each the path of a folder that PEFT or ossia wrote."""
    adapter_dir: str = ""
    """Folder that clients of the server may load more adapters from while it runs; empty allows none."""
    adapter_memory: Size = _2_GIB
    """Most memory that all adapters may take together; one that does not fit is refused."""
    host: str = "127.0.0.1"
    """Address that the server listens on; one that others reach needs key_file, or open_to_all."""
    port: Port = _PORT
    """Port that the server listens on; 0 takes a free one."""
    store: str = ""
    """Where responses are kept: an SQLAlchemy URL of SQLite or PostgreSQL; empty is a file in the data folder."""
    store_days: int = 30
    """Days that a response is kept after it was last continued; 0 for ever."""
    store_size: Size = _4_GIB
    """Most bytes of responses that are kept, the oldest go first; 0 for no bound."""
    key_file: str = ""
    """File with the hashed API keys that the server asks for; empty asks for none."""
    open_to_all: Literal["no", "yes"] = "no"
    """Whether the server may listen where others reach it without asking for a key."""
    max_request: Size = _32_MIB
    """Largest body of a request that the server reads."""
    max_running: int = 64
    """Requests that are answered at once."""
    max_queued: int = 256
    """Requests that may wait for their turn; more are refused with status 429."""
    max_per_minute: int = 0
    """Requests that one key, or one address without keys, may make in a minute; 0 for no limit."""
    tools: str = "auto"
    """Tools that the server runs for clients that ask: python, browser, mcp, comma between them; none; or auto."""
    python_sandbox: str = "auto"
    """What confines python: auto, bubblewrap, landlock, docker:, podman: or gvisor:IMAGE, jupyter:URL, or off."""
    ask_after_untrusted: Literal["no", "yes"] = "no"
    """Whether calls of MCP servers and functions need an approval once a tool's answer is in the context."""
    max_tool_calls: int = 128
    """Calls of tools that one response may make, 0 for no limit; a request may ask for fewer."""
    max_tool_seconds: int = 1800
    """Seconds from the beginning of a response after which no tool is run for it; 0 for no limit."""
    max_tool_tokens: int = 0
    """Tokens that tools may answer in one response before no more are run for it; 0 for no limit."""
    patch_folder: str = ""
    """Folder that the tool apply_patch works in; empty leaves the tool out."""
    audit_log: str = ""
    """File that every call of a tool is logged to, a JSON line each; empty for none."""
    audit_contents: Literal["no", "yes"] = "no"
    """Whether the log also keeps what tools were asked and answered, without what looks like a secret."""
    mcp: Mapping[str, McpServer] = field(default_factory=dict)
    """Servers of tools by name, each the table [mcp.NAME] of the file."""
    traces: str = ""
    """URL of an OpenTelemetry collector that is told where the time of each request goes; empty for none."""
    browser: str = ""
    """Where the browser tool searches: local:FOLDER, searxng:URL, exa, youcom, brave, tavily; empty for no browser."""
    browser_key: str = field(default="", repr=False)
    """API key of the search service that browser names."""
    browser_allow: str = ""
    """Domains that the browser may search and open, with those below them, parted by commas; empty for all."""
    browser_block: str = ""
    """Domains that the browser may not open, with those below them, parted by commas."""
    browser_links: Literal["auto", "any", "seen"] = "auto"
    """URLs that the browser opens: any; those seen by it or named by the user; auto, the latter beside functions."""
    browser_robots: Literal["yes", "no"] = "yes"
    """Whether the browser leaves alone what a site's robots.txt keeps from programs."""
    browser_requests: int = 100
    """Searches and pages that the browser may fetch in one conversation."""


def data_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where ossia keeps what it must not lose: `$XDG_DATA_HOME/ossia`, else `~/.local/share/ossia`."""
    home = (os.environ if environ is None else environ).get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.path.expanduser(home)) / "ossia"


_UNITS = {"": 1, "B": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}


_MAX_PORT = 65_535
# Far beyond every memory, and within what a float holds.
_MAX_SIZE_DIGITS = 30


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    toml_path: Path | None = None,
) -> Config:
    """Merge all layers; a flag that is None was not given.

    ``environ`` and ``toml_path`` stand in for the process's own. Raises ConfigError naming the source and the key for
    an unknown key or a value that does not fit, and for a file that is named by OSSIA_CONFIG but cannot be read.
    """
    environ = os.environ if environ is None else environ
    hints = get_type_hints(Config)
    values: dict[str, Any] = {}
    path, is_named = (toml_path, True) if toml_path else settings_file(environ)
    for key, value in _read_toml(path, is_named).items():
        if key not in hints:
            raise ConfigError(f"{path}: unknown setting {key!r}; {did_you_mean(key, hints)}")
        values[key] = _convert(f"{path}: {key}", value, hints[key])
    for key, hint in hints.items():
        variable = f"OSSIA_{key.upper()}"
        if variable in environ:
            values[key] = _convert(variable, environ[variable], hint)
    for key, value in (flags or {}).items():
        if value is not None:
            values[key] = _convert(f"--{key.replace('_', '-')}", value, hints[key])
    return dataclasses.replace(Config(), **values)


def from_arguments(arguments: Mapping[str, Any]) -> Config:
    """The defaults with ``arguments`` of a program in their place, in the types and spellings of the TOML file.

    Raises ConfigError for an unknown name or a value that does not fit.
    """
    hints = get_type_hints(Config)
    values = {}
    for name, value in arguments.items():
        if name not in hints:
            raise ConfigError(f"unknown setting {name!r}; {did_you_mean(name, hints)}", param=name)
        values[name] = _convert(name, value, hints[name])
    return dataclasses.replace(Config(), **values)


def parse_size(text: str | int) -> Size:
    """Bytes from "2GiB", "1.5 GB", "4096" or a number. Raises ValueError."""
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return Size(text)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip())
    if not match or match[2] not in _UNITS or len(match[1]) > _MAX_SIZE_DIGITS:
        raise ValueError(f"{text!r} is not a size")
    return Size(float(match[1]) * _UNITS[match[2]])


def filled_in(server: McpServer, name: str, environ: Mapping[str, str] | None = None) -> McpServer:
    """The server with the values of the environment variables that its texts name as ``${VARIABLE}``.

    Done when the server is used, so that its secrets are nowhere before. Raises ConfigError for one that is not set.
    """
    known = os.environ if environ is None else environ

    def value(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise ConfigError(f"mcp.{name}: the environment variable {match[1]} is not set")
        return known[match[1]]

    def fill(text: str) -> str:
        return _VARIABLE.sub(value, text)

    return dataclasses.replace(
        server,
        command=fill(server.command),
        args=tuple(fill(one) for one in server.args),
        env={key: fill(one) for key, one in server.env.items()},
        folder=fill(server.folder),
        url=fill(server.url),
        headers={key: fill(one) for key, one in server.headers.items()},
    )


def settings_file(environ: Mapping[str, str]) -> tuple[Path, bool]:
    """The settings file, there or not, and whether OSSIA_CONFIG names it."""
    if named := environ.get("OSSIA_CONFIG"):
        return Path(os.path.expanduser(named)), True
    home = environ.get("XDG_CONFIG_HOME") or "~/.config"
    # Unlike Path.expanduser this raises nothing for a user without a home, as in many containers.
    return Path(os.path.expanduser(home)) / "ossia" / "config.toml", False


def _read_toml(path: Path, is_named: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not is_named:
            return {}
        raise ConfigError(f"{path}: the settings file named by OSSIA_CONFIG does not exist") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def did_you_mean(key: str, known: Collection[str]) -> str:
    """The end of an error's message about an unknown name: the known one that looks like it, or all of them."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of: {', '.join(known)}"


def _convert(source: str, value: Any, hint: Any) -> Any:
    """A value of the setting's type, from TOML's types or from text; ``source`` opens the error's message."""
    if hint == Mapping[str, McpServer]:
        return _read_servers(source, value)
    if hint == Mapping[str, str]:
        return _read_adapters(source, value)
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{source} is {value!r}; expected one of: {', '.join(get_args(hint))}")
    try:
        if hint is Size:
            return parse_size(value)
        if hint in (int, Port) and not isinstance(value, bool | float):
            number = int(value)
            if number >= 0 and (hint is int or number <= _MAX_PORT):
                return hint(number)
        elif hint is str and isinstance(value, str):
            return value
    except (TypeError, ValueError):
        pass
    expected = {
        Size: "a size such as 2GiB",
        Port: f"a port, 0 to {_MAX_PORT}",
        int: "a whole number, 0 or more",
        str: "text",
    }[hint]
    raise ConfigError(f"{source} is {value!r}; expected {expected}")


_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")


def _read_adapters(source: str, value: Any) -> dict[str, str]:
    """Names and paths from a table, or from texts "name=path", with commas between them in one text."""
    pairs: list[tuple[str, Any]]
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, str | list | tuple):
        texts = [one.strip() for one in value.split(",")] if isinstance(value, str) else list(value)
        pairs = []
        for text in texts:
            name, equals, path = str(text).partition("=")
            if not equals:
                raise ConfigError(f"{source} is {text!r}; expected NAME=PATH")
            pairs.append((name, path))
    else:
        raise ConfigError(f"{source} is {value!r}; expected a table of names and paths")
    adapters: dict[str, str] = {}
    for name, path in pairs:
        if not isinstance(name, str) or not _ADAPTER_NAME.fullmatch(name):
            raise ConfigError(
                f"{source}: an adapter is named {name!r}; expected a letter or digit and up to 127 more, or any of . _ "
                ": / @ -"
            )
        if not isinstance(path, str | Path) or not str(path):
            raise ConfigError(f"{source}: the path of adapter {name!r} is {path!r}; expected a folder")
        if name in adapters:
            raise ConfigError(f"{source}: two adapters are named {name!r}; give each a name of its own")
        adapters[name] = str(path)
    return adapters


_SERVER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _read_servers(source: str, value: Any) -> dict[str, McpServer]:
    if not isinstance(value, dict):
        raise ConfigError(f"{source} is {value!r}; expected tables [mcp.NAME] in the settings file")
    servers = {}
    for name, table in value.items():
        where = f"{source}.{name}"
        if not _SERVER_NAME.fullmatch(name):
            raise ConfigError(f"{where}: expected a name of 1 to 64 letters, digits, '_' or '-'")
        if isinstance(table, McpServer):
            servers[name] = table
        elif isinstance(table, dict):
            servers[name] = _read_server(where, table)
        else:
            raise ConfigError(f"{where} is {table!r}; expected a table [mcp.{name}]")
    return servers


def _read_server(where: str, table: Mapping[str, Any]) -> McpServer:
    hints = get_type_hints(McpServer)
    values: dict[str, Any] = {}
    for key, value in table.items():
        here = f"{where}.{key}"
        if key not in hints:
            raise ConfigError(f"{where}: unknown setting {key!r}; {did_you_mean(key, hints)}")
        if hints[key] == Mapping[str, str]:
            if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
                # What stands there may be a secret, and is not repeated.
                raise ConfigError(f"{here}: expected a table of texts")
            values[key] = dict(value)
        elif hints[key] == tuple[str, ...]:
            if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
                raise ConfigError(f"{here}: expected a list of texts")
            values[key] = tuple(value)
        else:
            values[key] = _convert(here, value, hints[key])
    server = McpServer(**values)
    if bool(server.command) == bool(server.url):
        raise ConfigError(f"{where}: expected either a command or a url")
    if server.url and not server.url.startswith(("https://", "http://")):
        raise ConfigError(f"{where}.url: expected an address with http:// or https://")
    if server.timeout_s == 0:
        raise ConfigError(f"{where}.timeout_s is 0; expected at least 1")
    return server
