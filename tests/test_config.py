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
        ("model = 3", {}, {}, "model is 3; expected text"),
        ("", {"OSSIA_DENSE": "q3"}, {}, "OSSIA_DENSE is 'q3'; expected one of: q8, bf16"),
        ("", {}, {"kv_memory": "lots"}, "--kv-memory is 'lots'; expected a size such as 2GiB"),
        ("not toml", {}, {}, "not valid TOML"),
    ],
)
def test_a_bad_setting_is_refused_naming_where_it_stands(tmp_path, toml, environ, flags, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        _load(tmp_path, toml, environ, flags)


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
        ({"backend": "gpu"}, "backend is 'gpu'; expected one of: cpu, reference"),
    ):
        with pytest.raises(ConfigError, match=said):
            config.from_arguments(arguments)
