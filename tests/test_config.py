from __future__ import annotations

import pytest

from ossia import config
from ossia.errors import ConfigError


def _load(tmp_path, toml="", environ=None, flags=None):
    path = tmp_path / "config.toml"
    path.write_text(toml)
    return config.load(flags, environ={"OSSIA_CONFIG": str(path)} | (environ or {}))


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(tmp_path):
    assert config.load(environ={"XDG_CONFIG_HOME": str(tmp_path)}).threads == 0
    assert _load(tmp_path, "threads = 1").threads == 1
    assert _load(tmp_path, "threads = 1", {"OSSIA_THREADS": "2"}).threads == 2
    assert _load(tmp_path, "threads = 1", {"OSSIA_THREADS": "2"}, {"threads": 3}).threads == 3
    assert _load(tmp_path, "threads = 1", {}, {"threads": None}).threads == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("1.5 GB", 1_500_000_000), ("4096", 4096), (4096, 4096), ("512MiB", 512 << 20), ("7B", 7)],
)
def test_a_size_is_read_with_its_unit(text, size):
    assert config.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2XB", "-1GiB", "2 gigs", True, None, [1], -1, "9" * 400])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError):
        config.parse_size(text)


@pytest.mark.parametrize(
    ("toml", "environ", "flags", "said"),
    [
        ("thread = 1", {}, {}, "did you mean 'threads'"),
        ("zzz = 1", {}, {}, "expected one of: model"),
        ("threads = 'many'", {}, {}, "threads is 'many'; expected a whole number"),
        ("threads = 1.5", {}, {}, "threads is 1.5"),
        ("threads = true", {}, {}, "threads is True"),
        ("threads = -1", {}, {}, "threads is -1"),
        ("port = 70000", {}, {}, "port is 70000; expected a port, 0 to 65535"),
        ("", {"OSSIA_PORT": "http"}, {}, "OSSIA_PORT is 'http'; expected a port, 0 to 65535"),
        ("model = 3", {}, {}, "model is 3; expected text"),
        ("", {"OSSIA_DENSE": "q3"}, {}, "OSSIA_DENSE is 'q3'; expected one of: q8, bf16"),
        ("", {}, {"kv_memory": "lots"}, "--kv-memory is 'lots'; expected a size such as 2GiB"),
        ("not toml", {}, {}, "not valid TOML"),
        ("adapters = 3", {}, {}, "adapters is 3; expected a table of names and paths"),
        ("[adapters]\n'a b' = 'x'", {}, {}, "an adapter is named 'a b'"),
        ("[adapters]\na = 1", {}, {}, "the path of adapter 'a' is 1; expected a folder"),
        ("", {}, {"adapters": ["polite"]}, "--adapters is 'polite'; expected NAME=PATH"),
        ("", {}, {"adapters": ["a=x", "a=y"]}, "two adapters are named 'a'"),
        ("", {"OSSIA_ADAPTERS": "a="}, {}, "OSSIA_ADAPTERS: the path of adapter 'a' is ''"),
    ],
)
def test_a_bad_setting_is_refused_naming_where_it_stands(tmp_path, toml, environ, flags, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        _load(tmp_path, toml, environ, flags)


def test_adapters_come_from_a_table_a_variable_or_flags(tmp_path):
    toml = "[adapters]\npolite = '/a/polite'\n'team/terse' = 'b'"
    assert _load(tmp_path, toml).adapters == {"polite": "/a/polite", "team/terse": "b"}
    assert _load(tmp_path, toml, {"OSSIA_ADAPTERS": "x=1=2, y=b"}).adapters == {"x": "1=2", "y": "b"}
    assert _load(tmp_path, toml, {}, {"adapters": ["z=/c,d"]}).adapters == {"z": "/c,d"}
    assert config.from_arguments({"adapters": {"polite": tmp_path}}).adapters == {"polite": str(tmp_path)}


def test_a_missing_file_matters_only_when_it_was_named(tmp_path):
    assert config.load(environ={"XDG_CONFIG_HOME": str(tmp_path)}) == config.Config()
    with pytest.raises(ConfigError, match="does not exist"):
        config.load(environ={"OSSIA_CONFIG": str(tmp_path / "none.toml")})
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(environ={"OSSIA_CONFIG": str(tmp_path)})


def test_a_user_without_a_home_has_no_settings_file(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    assert config.load(environ={}) == config.Config()


def test_arguments_of_a_program_are_read_like_the_settings_file():
    assert config.from_arguments({"kv_memory": "2GiB", "threads": 3}) == config.Config(kv_memory=2 << 30, threads=3)
    for arguments, said in (
        ({"thread": 1}, "unknown setting 'thread'; did you mean 'threads'"),
        ({"threads": "many"}, "threads is 'many'; expected a whole number"),
        ({"kv_memory": -1}, "kv_memory is -1; expected a size"),
        ({"backend": "tpu"}, "backend is 'tpu'; expected one of: cpu, gpu, reference"),
    ):
        with pytest.raises(ConfigError, match=said):
            config.from_arguments(arguments)


# Tables [mcp.NAME] ---------------------------------------------------------------------------------------------------

SERVERS = """
threads = 2
[mcp.files]
command = "mcp-files"
args = ["--root", "${HOME}/x"]
env = { KEY = "${SECRET}" }
approval = "never"
[mcp.tracker]
url = "https://${HOST}/mcp"
headers = { Authorization = "Bearer ${SECRET}" }
timeout_s = 5
tools = ["search"]
"""


def test_servers_of_tools_are_tables_of_the_file(tmp_path):
    read = _load(tmp_path, SERVERS)
    assert read.threads == 2
    assert read.mcp == {
        "files": config.McpServer(
            command="mcp-files", args=("--root", "${HOME}/x"), env={"KEY": "${SECRET}"}, approval="never"
        ),
        "tracker": config.McpServer(
            url="https://${HOST}/mcp",
            headers={"Authorization": "Bearer ${SECRET}"},
            timeout_s=5,
            tools=("search",),
        ),
    }


def test_variables_are_filled_in_when_a_server_is_used(tmp_path):
    servers = _load(tmp_path, SERVERS).mcp
    environ = {"HOME": "/home/me", "SECRET": "s3cret", "HOST": "example.com"}
    files, tracker = (config.filled_in(server, name, environ) for name, server in servers.items())
    assert files.args == ("--root", "/home/me/x") and files.env == {"KEY": "s3cret"}
    assert tracker.url == "https://example.com/mcp" and tracker.headers == {"Authorization": "Bearer s3cret"}
    assert "s3cret" not in repr((files, tracker))
    with pytest.raises(ConfigError, match=r"mcp\.tracker: the environment variable HOST is not set"):
        config.filled_in(servers["tracker"], "tracker", {"SECRET": "x"})


def test_a_program_may_give_its_servers_as_objects_or_tables():
    server = config.McpServer(command="x")
    assert config.from_arguments({"mcp": {"a": server, "b": {"command": "x"}}}).mcp == {"a": server, "b": server}


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("mcp = 3", "mcp is 3; expected tables"),
        ("[mcp]\nfiles = 'x'", r"mcp\.files is 'x'; expected a table \[mcp\.files\]"),
        ("[mcp.'a b']\ncommand = 'x'", "expected a name of 1 to 64 letters"),
        ("[mcp.a]", r"mcp\.a: expected either a command or a url"),
        ("[mcp.a]\ncommand = 'x'\nurl = 'https://x'", "either a command or a url"),
        ("[mcp.a]\nurl = 'ftp://x'", r"mcp\.a\.url: expected an address with http"),
        ("[mcp.a]\ncomand = 'x'", r"mcp\.a: unknown setting 'comand'; did you mean 'command'"),
        ("[mcp.a]\ncommand = 'x'\nargs = 'y'", r"mcp\.a\.args: expected a list of texts"),
        ("[mcp.a]\ncommand = 'x'\nargs = [1]", r"mcp\.a\.args: expected a list of texts"),
        ("[mcp.a]\ncommand = 'x'\nenv = { A = 1 }", r"mcp\.a\.env: expected a table of texts"),
        ("[mcp.a]\ncommand = 'x'\ntimeout_s = 'long'", r"mcp\.a\.timeout_s is 'long'; expected a whole number"),
        ("[mcp.a]\ncommand = 'x'\ntimeout_s = 0", r"mcp\.a\.timeout_s is 0"),
        ("[mcp.a]\ncommand = 'x'\napproval = 'maybe'", r"mcp\.a\.approval is 'maybe'; expected one of: always, never"),
    ],
)
def test_a_bad_table_is_refused_naming_where_it_stands(tmp_path, toml, said):
    with pytest.raises(ConfigError, match=said):
        _load(tmp_path, toml)


def test_a_secret_is_not_repeated_by_an_error(tmp_path):
    with pytest.raises(ConfigError) as raised:
        _load(tmp_path, "[mcp.a]\nurl = 'https://x'\nheaders = ['s3cret']")
    assert "s3cret" not in str(raised.value)


def test_servers_cannot_be_set_by_a_variable(tmp_path):
    with pytest.raises(ConfigError, match="OSSIA_MCP is 'x'; expected tables"):
        _load(tmp_path, "", {"OSSIA_MCP": "x"})
