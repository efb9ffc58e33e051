"""`ossia doctor`: what it finds on this machine is true, and what is not well comes with a sentence on what to do."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from tests.cli.test_chat import Terminal

from ossia import _kernels
from ossia.cli import findings
from ossia.cli.findings import Finding
from ossia.config import Config, McpServer
from ossia.errors import UnavailableError
from ossia.model.memory import available_bytes, weight_bytes
from ossia.model.random_checkpoint import SHAPES, write_random_checkpoint
from ossia.tools.sandbox.tiers import TierReport

GIB = 1 << 30
AREAS = ["settings", "ossia", "processor", "memory", "model", "disk", "python", "browser", "mcp", "server", "gpu"]


@pytest.fixture
def environ(tmp_path):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OSSIA_")}
    here = {"XDG_CONFIG_HOME": str(tmp_path / "config"), "XDG_DATA_HOME": str(tmp_path / "data"), "OSSIA_PORT": "0"}
    return clean | here | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def doctor(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    # Whoever imported torch would fail.
    code = "import sys; sys.modules['torch'] = None; from ossia.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)


def told(found, *, state: str | None = None) -> str:
    return "\n".join(f"{one.words} | {one.advice}" for one in found if state in (None, one.state))


# The command ------------------------------------------------------------------------------------------------------


def test_every_area_is_told_for_people_and_for_programs(environ):
    done = doctor(environ, "--json")
    read = json.loads(done.stdout)
    found = [Finding(**one) for one in read["findings"]]
    assert list(dict.fromkeys(one.area for one in found)) == AREAS
    assert {one.state for one in found} <= {"ok", "info", "warn", "bad"}
    assert read["ok"] and done.returncode == 0 and not done.stderr, told(found, state="bad")
    assert all(one.advice for one in found if one.state in ("warn", "bad"))
    shown = doctor(environ)
    assert shown.returncode == 0 and "\x1b" not in shown.stdout
    assert all(f"\n{area} " in f"\n{shown.stdout}" for area in AREAS)
    # Nobody's secrets, and no key of the settings.
    asked = doctor(environ | {"OSSIA_BROWSER": "exa", "OSSIA_BROWSER_KEY": "hush-hush"}, "--json")
    assert "hush-hush" not in asked.stdout + asked.stderr and "exa is set" in asked.stdout


def test_only_what_is_needed_and_broken_ends_with_1(environ, tmp_path):
    path = tmp_path / "config" / "ossia" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text('model = "/no/such/model"\npython_sandbox = "off"\n[mcp.gone]\ncommand = "/no/such/program"\n')
    done = doctor(environ | {"OSSIA_PORTS": "1"})
    assert done.returncode == 1, done.stdout
    for words in (
        f"{path} is read",
        "OSSIA_PORTS is set and is no setting\n               -> Call it OSSIA_PORT, or unset it.",
        "BAD there is no file or folder /no/such/model",
        "BAD [mcp.gone]: the program '/no/such/program' is not found",
        "the tool is switched off",
    ):
        assert words in done.stdout, done.stdout
    path.write_text("threads = 'many'\n")
    done = doctor(environ)
    assert done.returncode == 1 and "BAD" in done.stdout and "threads is 'many'; expected a whole number" in done.stdout
    # The rest is told all the same.
    assert "kernels: " in done.stdout


def test_on_a_terminal_nothing_is_cut_and_words_stay_in_their_column(environ, tmp_path):
    command = [sys.executable, "-m", "ossia", "doctor"]
    terminal = Terminal(command, environ | {"TERM": "xterm-256color"})
    shown = terminal.until("(All is well|less than it could be)")
    assert terminal.leave() == 0
    plain = re.sub("\x1b\\[[0-9;]*m", "", shown).replace("\r", "")
    assert "kernels: " in plain and max(map(len, plain.split("\n"))) <= 100
    assert all(line.startswith((*AREAS, " " * 11)) for line in plain.strip("\n").split("\n")[:-2]), plain


# Area by area -----------------------------------------------------------------------------------------------------


def test_the_kernels_that_run_are_named():
    [cores, kernels] = findings.look_at_processor(Config(threads=1))
    assert cores.words.endswith("1 are used")
    assert kernels.details["kernels"] == _kernels.best_isa() and kernels.details["kernels"] in kernels.words


@pytest.mark.parametrize(
    ("machine", "state", "lacks"),
    [("x86_64", "warn", "AVX2"), ("arm64", "warn", "dot products"), ("riscv64", "ok", "")],
)
def test_a_processor_without_fast_products_is_told_what_that_means(machine, state, lacks, monkeypatch):
    monkeypatch.setattr(_kernels, "best_isa", lambda: "portable")
    monkeypatch.setattr("platform.machine", lambda: machine)
    found = list(findings.look_at_processor(Config()))
    assert found[-1].state == state and lacks in found[-1].words and lacks in found[-1].advice


def test_memory_is_compared_with_what_each_model_needs():
    found = list(findings.look_at_memory(Config(), (16 * GIB, 32 * GIB)))
    assert [one.state for one in found] == ["ok", "ok", "info"]
    assert "16.0 GiB of 32.0 GiB" in found[0].words and "gpt-oss-20b needs 12." in found[1].words
    assert found[1].details["needed_bytes"] < 16 * GIB < found[2].details["needed_bytes"]
    # A model that the settings name is another matter.
    for name in ("openai/gpt-oss-120b", "gpt-oss-safeguard-120b", "gpt-oss:120b"):
        found = list(findings.look_at_memory(Config(model=name), (16 * GIB, 32 * GIB)))
        assert found[-1].state == "warn" and "Free 4" in found[-1].advice
    more = list(findings.look_at_memory(Config(kv_memory=8 * GIB), (16 * GIB, 32 * GIB)))
    assert more[1].state == "info" and "keys and values 8.0 GiB" in more[1].words


def test_what_weights_take_is_what_a_checkpoint_of_that_shape_has(tmp_path):
    from dataclasses import replace

    from ossia.model.inspection import inspect_checkpoint

    shape = replace(SHAPES["tiny"], num_layers=2, hidden_size=256, intermediate_size=512, vocab_size=512)
    shape = replace(shape, stop_token_ids=(1,), pad_token_id=0)
    found = inspect_checkpoint(write_random_checkpoint(tmp_path / "made", shape))
    table = shape.vocab_size * shape.hidden_size * 2
    told_bytes = weight_bytes(shape, "bf16")
    assert abs(found.size_bytes - table - told_bytes) < 0.02 * told_bytes
    assert weight_bytes(shape, "q8") < told_bytes


def test_the_memory_of_this_machine_is_read():
    available, total = available_bytes()
    assert 0 < available <= total


def test_a_model_of_the_settings_is_looked_at(tmp_path):
    path = write_random_checkpoint(tmp_path / "tiny", "tiny")
    assert told(findings.look_at_models(Config(model=str(path)))).startswith(f"{path}: no published shape, hf")
    next(path.glob("*.safetensors")).unlink()
    found = list(findings.look_at_models(Config(model=str(path))))
    assert found[-1].state == "bad" and found[-1].advice


def test_a_folder_that_cannot_be_written_is_bad_and_a_full_disk_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "ossia").mkdir()
    (tmp_path / "ossia" / "x").write_bytes(b"x" * (3 << 20))
    assert "take 3.0 MiB" in told(findings.look_at_disks(Config()), state="ok")
    monkeypatch.setattr(findings, "_free_bytes", lambda folder: 100 << 20)
    assert "is made again" in told(findings.look_at_disks(Config()), state="warn")
    assert "set HF_HOME" in told(findings.look_at_disks(Config()))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    assert "cannot be written" in told(findings.look_at_disks(Config()), state="bad")


class Reported:
    """Sessions that have found what a test says."""

    reports: tuple[TierReport, ...] = ()

    def __init__(self, choice: str, num_warm: int) -> None: ...

    async def report(self) -> list[TierReport]:
        return list(self.reports)

    async def aclose(self) -> None: ...


GONE = TierReport("bubblewrap", False, "bubblewrap is not installed (Debian, Ubuntu: ...)", False)
LANDLOCK = TierReport("landlock", True, "works: 10 attacks failed", True)
NO_LANDLOCK = TierReport("landlock", False, "landlock: this kernel has no Landlock", False)
DOCKER = TierReport("docker", False, "docker: no daemon", False)


@pytest.mark.parametrize(
    ("settings", "reports", "state", "said", "advice"),
    [
        (Config(), (GONE, LANDLOCK), "ok", "the tool runs in landlock", ""),
        (Config(), (GONE, NO_LANDLOCK), "warn", "the tool is off, since no sandbox works here", "bubblewrap"),
        (Config(tools="browser,python"), (GONE, NO_LANDLOCK), "bad", "the tool is off", "bubblewrap"),
        (Config(python_sandbox="docker:x"), (GONE, NO_LANDLOCK, DOCKER), "bad", "the tool is off", "bubblewrap"),
        (
            Config(python_sandbox="docker:x"),
            (GONE, TierReport("landlock", True, "works: 10 attacks failed", False), DOCKER),
            "bad",
            "python_sandbox is 'docker:x' and that does not work",
            "Set python_sandbox to auto",
        ),
        (Config(python_sandbox="off"), (GONE, NO_LANDLOCK), "info", "switched off", ""),
    ],
)
def test_each_sandbox_is_told_with_its_state_and_the_step_that_installs_it(
    monkeypatch, settings, reports, state, said, advice
):
    monkeypatch.setattr("ossia.tools.python.PythonSessions", Reported)
    monkeypatch.setattr(Reported, "reports", reports)
    monkeypatch.setattr(findings, "install_step", lambda package: f"`apt-get install {package}`")
    found = findings.look_at_python(settings)
    assert found[0].words == f"bubblewrap: {GONE.words}" and "`apt-get install bubblewrap`" in found[0].advice
    [end] = [one for one in found if one.words.startswith("the tool ")]
    assert end.state == state and said in end.words and advice in end.advice


def test_the_sandboxes_of_this_machine_are_attacked():
    found = findings.look_at_python(Config())
    assert [one.details.get("tier") for one in found[:2]] == ["bubblewrap", "landlock"]
    if not any(one.details.get("works") for one in found[:2]):
        pytest.skip(f"no sandbox works on this machine: {told(found)}")
    assert "attacks failed" in told(found, state="ok") and "the tool runs in" in told(found, state="ok")


def test_each_layer_of_the_sandbox_is_told(monkeypatch):
    names = ["identity", "namespaces", "Landlock", "seccomp", "control group"]
    found = list(findings.look_at_layers(sandboxed="bubblewrap"))
    assert [one.words.removeprefix("layer ").partition(":")[0] for one in found] == names
    assert ("root" in found[0].words) == (os.geteuid() == 0) and "proven" in found[1].words
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("ossia.tools.sandbox.inside.landlock.abi", lambda: 0)
    monkeypatch.setattr("ossia.tools.sandbox.inside.seccomp.is_supported", lambda: False)
    monkeypatch.setattr("ossia.tools.sandbox.cgroup.Cgroup.make", lambda limits: None)
    monkeypatch.setattr(findings, "_sysctl", lambda name: "0")
    found = list(findings.look_at_layers())
    assert [one.state for one in found] == ["ok", "info", "info", "info", "info"]
    assert all(one.advice for one in found[1:]) and "an ordinary user" in found[0].words
    assert "user.max_user_namespaces = 0" in found[1].words and "the kernel has none" in found[2].words
    monkeypatch.setattr("ossia.tools.sandbox.inside.landlock.abi", lambda: 3)
    assert "ABI 3; signals to other processes are not scoped" in told(findings.look_at_layers())


@pytest.mark.parametrize(
    ("program", "step"),
    [
        ("apt-get", "apt-get install bubblewrap`"),
        ("dnf", "dnf install bubblewrap`"),
        ("pacman", "pacman -S bubblewrap`"),
        ("apk", "apk add bubblewrap`"),
        ("nix-env", "nix-env -iA nixpkgs.bubblewrap`"),
        ("none", "install the package bubblewrap of this system"),
    ],
)
def test_the_step_is_that_of_the_systems_own_package_manager(tmp_path, program, step):
    path = tmp_path / program
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    assert findings.install_step("bubblewrap", str(tmp_path)).endswith(step)


def test_the_browser_is_looked_at_with_its_index_its_parsers_and_their_confinement(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# A\n\nwords")
    words = told(findings.look_at_browser(Config(browser=f"local:{tmp_path / 'docs'}")))
    assert "HTML and PDF are read" in words and "confined by limits" in words and "0 documents indexed" in words
    assert "no place to search is set" in told(findings.look_at_browser(Config()), state="info")
    for settings, said in (
        (Config(browser="brave"), "browser_key is empty"),
        (Config(browser="local:/no/such/folder"), "is not a folder"),
    ):
        [bad] = [one for one in findings.look_at_browser(settings) if one.state == "bad"]
        assert said in bad.words and bad.advice
    assert "exa is set" in told(findings.look_at_browser(Config(browser="exa", browser_key="k")), state="ok")


@pytest.mark.parametrize(("landlock", "seccomp", "state"), [(6, True, "ok"), (0, True, "info"), (3, False, "info")])
def test_what_confines_the_parser_is_told(landlock, seccomp, state):
    found = findings._parser_layers({"landlock": landlock, "seccomp": seccomp})
    assert found.state == state and bool(found.advice) == (state != "ok")
    assert ("no Landlock" in found.words) == (not landlock) and ("no seccomp" in found.words) == (not seccomp)


def test_a_parser_that_cannot_work_is_bad(monkeypatch):
    def fail(*_: object) -> None:
        raise UnavailableError("no child")

    monkeypatch.setattr("ossia.tools.web.parse_child.Parser.render", fail)
    assert "documents cannot be parsed: no child" in told(findings.look_at_browser(Config()), state="bad")


def test_servers_of_the_settings_are_looked_at_and_none_is_started(monkeypatch, tmp_path):
    monkeypatch.delenv("NOT_SET", raising=False)
    mark = tmp_path / "started"
    servers = {
        "here": McpServer(command=sys.executable, args=("-c", f"open({str(mark)!r}, 'w')")),
        "gone": McpServer(command="no-such-program"),
        "secret": McpServer(url="https://example.com/mcp", headers={"Authorization": "Bearer ${NOT_SET}"}),
        "far": McpServer(url="https://example.com/mcp?key=hush", approval="never"),
    }
    found = list(findings.look_at_mcp(Config(mcp=servers)))
    assert [one.state for one in found[1:]] == ["ok", "bad", "bad", "ok"]
    assert "the variable NOT_SET is not set" in told(found).replace("environment ", "") and "hush" not in told(found)
    assert not mark.exists()
    monkeypatch.setattr(findings, "_version_of", lambda package: None)
    assert next(findings.look_at_mcp(Config())).state == "info"
    [missing, *_] = findings.look_at_mcp(Config(tools="mcp"))
    assert missing.state == "bad" and "pip install 'ossia[mcp]'" in missing.advice


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        [found] = findings.look_at_port(Config(port=taken.getsockname()[1]))
    assert found.state == "warn" and "cannot be listened on" in found.words and "--port" in found.advice
    [found] = findings.look_at_port(Config(port=0))
    assert found.state == "ok"


@pytest.mark.parametrize(
    ("shown", "torch", "state", "said"),
    [
        (None, None, "info", "no NVIDIA GPU (nvidia-smi finds none); torch is not installed"),
        (None, "2.13.0+cpu", "info", "torch 2.13.0+cpu (for processors alone)"),
        ("NVIDIA H100 80GB HBM3, 81559 MiB, 550.54", "2.13.0+cpu", "info", "NVIDIA H100 80GB HBM3, 81559 MiB"),
        ("NVIDIA H100 80GB HBM3, 81559 MiB, 550.54", "2.13.0+cu126", "ok", "driver 550.54; torch 2.13.0+cu126"),
        ("Failed to initialize NVML", None, "info", "no NVIDIA GPU"),
    ],
)
def test_a_gpu_and_its_torch_are_told(monkeypatch, tmp_path, shown, torch, state, said):
    if shown is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho '{shown}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if shown else str(tmp_path))
    monkeypatch.setattr(findings, "_version_of", lambda package: torch)
    [found] = findings.look_at_gpu(Config())
    assert found.state == state and said in found.words
    [found] = findings.look_at_gpu(Config(backend="gpu"))
    assert found.state == ("ok" if state == "ok" else "bad") and bool(found.advice) == (state != "ok")


def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(findings, "_gpus", lambda: ["NVIDIA H100 80GB HBM3"])
    monkeypatch.setattr(findings, "_version_of", {"torch": "2.13.0+cu126", "triton": None}.get)
    [found] = findings.look_at_gpu(Config())
    assert found.state == "info" and "triton is not installed" in found.words and "ossia[gpu]" in found.advice


def test_a_package_that_is_missing_or_too_old_is_bad_with_the_command_that_mends_it(monkeypatch):
    def version(name: str) -> str:
        if name == "lxml":
            raise metadata.PackageNotFoundError(name)
        return {"h11": "0.1"}.get(name, "99")

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: ["h11>=0.14", "lxml>=5.3", "idna", 'x>1; extra == "dev"'])
    found = [one for one in findings.look_at_packages() if one.state == "bad"]
    assert [one.words for one in found] == ["h11 is 0.1; expected >=0.14", "lxml is not installed; expected >=5.3"]
    assert found[0].advice.endswith("-m pip install --upgrade 'h11>=0.14'`.")


def test_a_fault_in_one_area_leaves_the_others(monkeypatch):
    def fail(_: Config) -> None:
        raise RuntimeError("odd machine")

    monkeypatch.setattr(findings, "look_at_gpu", fail)
    monkeypatch.setattr(findings, "look_at_python", lambda settings: [])
    found = findings.look()
    assert [one.words for one in found if one.area == "gpu"] == ["could not be looked at: RuntimeError: odd machine"]
    assert any(one.area == "memory" for one in found)


def test_settings_say_where_they_come_from(tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_text("threads = 2")
    found, settings = findings.look_at_settings({"OSSIA_CONFIG": str(path), "OSSIA_KV": "q8"})
    assert settings.threads == 2 and "OSSIA_CONFIG, OSSIA_KV" in told(found)
    assert found[-1].details == {"changed": ["threads", "kv"]}
    found, settings = findings.look_at_settings({"OSSIA_CONFIG": str(tmp_path / "none")})
    assert found[0].state == "bad" and settings == Config() and str(tmp_path / "none") in found[0].advice
    found, _ = findings.look_at_settings({"XDG_CONFIG_HOME": str(tmp_path), "OSSIA_KV": "q3"})
    assert found[0].state == "bad" and "variable" in found[0].advice
