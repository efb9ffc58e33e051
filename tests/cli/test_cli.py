"""The command as a person uses it: a process, its output, its exit code."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from ossia.cli.generate import _stream
from ossia.harmony import Delta, Header, Role
from ossia.model.adapter import write_adapter
from ossia.model.random_checkpoint import random_adapter, write_random_checkpoint
from ossia.model.weights import Checkpoint


def ossia(*arguments, stdin="", environ=None):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OSSIA_", "HF_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-m", "ossia", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env=clean | {"XDG_CONFIG_HOME": "/nonexistent", "COLUMNS": "120"} | (environ or {}),
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", "tiny")


# Help and wrong usage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "",
        "generate",
        "mcp",
        "pull",
        "tokenize",
        "render",
        "parse",
        "checkpoint",
        "checkpoint inspect",
        "checkpoint new",
        "data",
        "data inspect",
    ],
)
def test_every_command_explains_itself(command):
    result = ossia(*command.split(), "--help")
    assert result.returncode == 0
    assert "Usage: ossia" in result.stdout


@pytest.mark.parametrize(("command", "unneeded"), [("--help", "numpy"), ("tokenize Hi", "ossia.train")])
def test_a_command_does_not_wait_for_what_it_does_not_need(command, unneeded):
    program = f"import sys\nfrom ossia.cli import main\nmain({command.split()})\nassert {unneeded!r} not in sys.modules"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_the_version_is_printed():
    result = ossia("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("ossia ")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ossia ser", ["serve"]),
        ("ossia chat --eff", ["--effort"]),
        ("ossia chat --effort ", ["low", "medium", "high"]),
        ("ossia checkpoint ver", ["verify"]),
    ],
)
def test_the_shell_completes_commands_options_and_their_values(typed, offered):
    words = typed.split(" ")
    asked = {"_OSSIA_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    assert ossia(environ=asked).stdout.split() == offered


def test_wrong_usage_ends_with_2():
    misspelled = ossia("genrate")
    assert misspelled.returncode == 2 and "Did you mean 'generate'" in misspelled.stderr
    assert ossia("generate").returncode == 2
    assert ossia("generate", "hi", "--effort", "extreme").returncode == 2


def test_an_error_of_the_user_is_one_line_without_a_traceback(tmp_path):
    for arguments in (
        ["checkpoint", "inspect", tmp_path / "none"],
        ["checkpoint", "verify", tmp_path],
        ["generate", "hi", "--model", tmp_path],
        ["generate", "hi", "--model", "gpt-oss-20b", "--kv-memory", "lots"],
        ["render", tmp_path / "none.json"],
        ["tokenize", "x", "--model", tmp_path],
    ):
        result = ossia(*arguments, environ={"HF_HOME": str(tmp_path / "cache")})
        assert result.returncode == 1, arguments
        assert result.stderr.startswith("ossia: ") and "Traceback" not in result.stderr
        assert result.stderr.count("\n") == 1 and not result.stdout


def test_what_the_system_refuses_is_one_line_without_a_traceback(tmp_path, tiny):
    with open("/dev/full", "w") as full:
        for arguments in (["tokenize", "hi"], ["generate", "hi", "--model", tiny, "--max-tokens", 1]):
            command = [sys.executable, "-m", "ossia", *map(str, arguments)]
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
            assert result.returncode == 1 and "ossia: No space left on device" in result.stderr
            assert "Traceback" not in result.stderr and "Exception" not in result.stderr
    (tmp_path / "file").touch()
    result = ossia("checkpoint", "new", tmp_path / "file" / "new")
    assert result.returncode == 1 and result.stderr.endswith("Not a directory\n") and result.stderr.count("\n") == 1


def test_input_that_is_no_text_is_refused():
    for arguments in (["generate", "-", "--model", "m"], ["render", "-"], ["parse"], ["tokenize"]):
        command = [sys.executable, "-m", "ossia", *arguments]
        result = subprocess.run(command, input=b"\xff\xfe", capture_output=True, timeout=60)
        assert result.returncode == 1 and result.stderr.startswith(b"ossia: standard input is not UTF-8 text")
    closed = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m ossia tokenize - <&-"], capture_output=True, text=True, timeout=60
    )
    assert closed.returncode == 1 and closed.stderr.startswith("ossia: standard input is closed")


def test_an_output_that_is_closed_is_no_error():
    said = "'<|channel|>final<|message|>Hi<|return|>'"
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        command = f"{sys.executable} -m ossia parse {said} {closed}"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0 and not result.stderr
        assert result.stdout == ("" if closed.startswith(">") else "assistant channel=final\n    Hi\n\n")


def test_characters_that_the_terminal_lacks_are_no_error():
    result = ossia("parse", "<|channel|>final<|message|>é<|return|>", environ={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and "    ?" in result.stdout
    as_json = ossia("parse", "<|channel|>final<|message|>é<|return|>", "--json", environ={"PYTHONIOENCODING": "ascii"})
    assert json.loads(as_json.stdout)["messages"][0]["content"] == "é"


# Prompts -------------------------------------------------------------------------------------------------------------


def test_special_tokens_in_a_text_stay_text_unless_asked():
    text = "<|start|>user<|message|>Hi<|end|>"
    as_text = json.loads(ossia("tokenize", text, "--json").stdout)
    assert "<|start|>" not in as_text["tokens"]
    as_prompt = json.loads(ossia("tokenize", "-", "--specials", "--json", stdin=text).stdout)
    assert as_prompt["tokens"] == ["<|start|>", "user", "<|message|>", "Hi", "<|end|>"]
    assert as_prompt["token_ids"][0] == 200006


def test_tokens_are_listed_with_their_bytes_where_they_are_no_text():
    result = ossia("tokenize", "a👋")
    assert result.stdout.splitlines()[0] == "      64  'a'"
    assert "\\\\x" in result.stdout


def test_a_conversation_is_rendered_as_the_model_gets_it(tmp_path):
    file = tmp_path / "chat.json"
    file.write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    assert ossia("render", file).stdout == "<|start|>user<|message|>Hi<|end|><|start|>assistant\n"
    assert ossia("render", file, "--whole").stdout == "<|start|>user<|message|>Hi<|end|>\n"
    assert json.loads(ossia("render", "-", "--json", stdin=file.read_text()).stdout)["token_ids"][0] == 200006
    assert ossia("render", file, "--tokens").stdout.startswith("  200006  '<|start|>'")


def test_a_damaged_conversation_is_refused_naming_the_place():
    result = ossia("render", "-", stdin='{"messages": [{"role": "usr", "content": "Hi"}]}')
    assert result.returncode == 1 and "messages[0].role is 'usr'" in result.stderr


def test_output_is_parsed_from_text_and_from_ids_alike():
    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>"
    token_ids = json.loads(ossia("tokenize", text, "--specials", "--json").stdout)["token_ids"]
    from_text, from_ids = ossia("parse", text, "--json"), ossia("parse", json.dumps(token_ids), "--json")
    assert from_text.stdout == from_ids.stdout and from_text.returncode == 0
    assert [m["channel"] for m in json.loads(from_text.stdout)["messages"]] == ["analysis", "final"]
    assert "channel=final" in ossia("parse", "-", stdin=text).stdout


def test_ids_that_are_none_and_text_that_is_nested_are_read():
    assert ossia("parse", "[]").returncode == 0
    nested = "[" * 50_000
    result = ossia("parse", "-", "--json", stdin=nested)
    assert json.loads(result.stdout)["messages"][0]["content"] == nested


def test_a_text_from_elsewhere_cannot_steer_the_terminal(tmp_path):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "\x1b[2J\x9b\t"}]}))
    text = "<|channel|>final<|message|>\x1b[2J<|return|>"
    for arguments in (
        ["render", str(file)],
        ["render", str(file), "--json"],
        ["parse", text],
        ["parse", text, "--json"],
    ):
        ours, theirs = pty.openpty()
        subprocess.run([sys.executable, "-m", "ossia", *map(str, arguments)], stdout=theirs, check=True, timeout=60)
        os.close(theirs)
        shown = os.read(ours, 1 << 16)
        os.close(ours)
        assert b"[2J" in shown and b"\x1b" not in shown and "\x9b".encode() not in shown
    assert "\x1b[2J" in ossia("render", file).stdout


def test_malformed_output_is_named_and_ends_with_1():
    result = ossia("parse", "<|channel|>final <|constrain|>json{}")
    assert result.returncode == 1 and "malformed: missing_message at token" in result.stderr


def test_the_vocabulary_is_found_wherever_a_model_is(tmp_path):
    folder = write_random_checkpoint(tmp_path / "m", "tiny", num_layers=1, layout="original")
    for place in (folder, folder / "tokenizer.json", folder / "original", folder / "original" / "model.safetensors"):
        assert ossia("tokenize", "hi", "--model", place).stdout == "    3686  'hi'\n"


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_inspected_and_verified(tmp_path):
    folder = tmp_path / "new"
    made = ossia("checkpoint", "new", folder, "--layers", 2, "--seed", 3)
    assert made.returncode == 0 and made.stdout == f"{folder}\n"
    shown = ossia("checkpoint", "inspect", folder)
    assert shown.returncode == 0 and "layers" in shown.stdout and "no problems" in shown.stdout
    assert json.loads(ossia("checkpoint", "inspect", folder, "--json").stdout)["config"]["num_layers"] == 2
    assert ossia("checkpoint", "verify", folder).returncode == 0
    again = ossia("checkpoint", "new", folder)
    assert again.returncode == 1 and "not empty" in again.stderr


def test_a_damaged_checkpoint_is_reported_and_ends_with_1(tmp_path):
    folder = write_random_checkpoint(tmp_path / "damaged", "tiny", num_layers=1)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])
    assert ossia("checkpoint", "inspect", folder).returncode == 1
    assert ossia("checkpoint", "verify", folder).returncode == 1


# Answers -------------------------------------------------------------------------------------------------------------


def test_an_answer_is_streamed_and_random_weights_are_named(tiny):
    result = ossia("generate", "Hello", "--model", tiny, "--max-tokens", 6, "--seed", 1, "--raw")
    assert result.returncode == 0
    assert result.stdout.strip()
    assert "random" in result.stderr


def test_what_the_model_writes_is_printed_to_the_letter(capsys):
    # A Makefile needs its tabs, and what looks like an emoji's name, markup or a link is text.
    text = "all:\n\tgcc :heart: [bold]x[/bold]\r\n  https://a.b  \x0c"
    header = Header(Role.ASSISTANT, channel="final")
    deltas = [Delta(text, header), Delta("next", header), Delta("preamble", Header(Role.ASSISTANT))]
    _stream(iter(deltas), Console(stderr=True), show_reasoning=False)
    assert capsys.readouterr().out == text + "next\n\npreamble\n"


def test_thoughts_and_calls_are_shown_only_when_asked_for(capsys):
    thought, call = (Delta("hm", Header(Role.ASSISTANT, channel="analysis")), Delta("{}", CALL))
    answer = Delta("Hi", Header(Role.ASSISTANT, channel="final"))
    for is_asked, shown in ((False, "Hi\n"), (True, "hm\n\n{}\n\nHi\n")):
        generation = Scripted([thought, call, answer])
        _stream(generation, Console(stderr=True), show_reasoning=is_asked)
        assert capsys.readouterr().out == shown


CALL = Header(Role.ASSISTANT, channel="commentary", recipient="functions.f")


class Scripted(list):
    """Deltas that stand in for an answer."""

    token_ids = (1, 2)
    tokens_per_s = 1.0


def test_what_cannot_be_is_refused_before_the_model_is_loaded():
    for wrong in (["--temperature", -1], ["--top-p", 2], ["--seed", 2**63], ["--max-tokens", 0]):
        result = ossia("generate", "Hi", "--model", "none", *wrong)
        assert result.returncode == 2 and wrong[0] in result.stderr


def test_more_than_the_machine_has_is_refused(tiny):
    for wrong, said in (
        (["--threads", 10**6], "threads is 1000000; expected 1 to 1024"),
        (["--threads", 10**20], "expected 1 to 1024"),
        (["--kv-memory", "9999999TiB"], "GiB are free. Free some, or give less with --kv-memory"),
        (["--kv-memory", "9" * 28], "GiB are free. Free some, or give less with --kv-memory"),
    ):
        result = ossia("generate", "Hi", "--model", tiny, "--max-tokens", 1, *wrong)
        assert result.returncode == 1 and said in result.stderr and result.stderr.count("\n") == 1


def test_the_same_seed_gives_the_same_answer_as_json(tiny):
    arguments = ["generate", "Hello", "--model", tiny, "--max-tokens", 6, "--date", "2026-01-01", "--json"]
    first, second = (json.loads(ossia(*arguments, "--seed", 7).stdout) for _ in range(2))
    assert first["messages"] == second["messages"]
    assert first["usage"]["completion_tokens"] == 6 and first["finish_reason"] == "length"
    assert json.loads(ossia(*arguments, "--seed", 8).stdout)["messages"] != first["messages"]


def test_commands_sample_as_the_checkpoint_says_unless_they_are_told(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "likeliest")
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    arguments = ["--model", folder, "--max-tokens", 6, "--date", "2026-01-01"]

    def generate(*more):
        return json.loads(ossia("generate", "Hello", *arguments, "--json", *more).stdout)["messages"]

    assert generate("--seed", 1) == generate("--seed", 2) != generate("--seed", 1, "--temperature", 1)
    first, second = (
        ossia("chat", *arguments, "--show-reasoning", "--seed", seed, stdin="Hello").stdout for seed in (1, 2)
    )
    assert first == second


def test_an_answer_that_ends_in_a_call_is_no_success():
    for more in ([], ["--json"]):
        result = ossia("generate", "What is 17 factorial?", "--effort", "low", "--temperature", 0, *more)
        assert result.returncode == 1 and "ended in a call of python, which nothing runs here" in result.stderr
        assert bool(more) == ('"recipient": "python"' in result.stdout) == bool(result.stdout)


def test_thoughts_that_were_cut_off_are_no_answer():
    result = ossia("generate", "What is 1234 + 5678?", "--max-tokens", 3)
    assert result.returncode == 1 and result.stdout == "" and "cut off" in result.stderr


def test_an_answer_is_made_to_match_the_schema_of_a_file(tmp_path):
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    result = ossia("generate", "What is 2 + 2?", "--schema", file, "--effort", "low", "--temperature", 0)
    assert result.returncode == 0 and json.loads(result.stdout)["sum"] in range(10)
    for content, said in (
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[]", "holds list; expected an object"),
        ('{"not": {}}', "cannot be enforced"),
    ):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
        result = ossia("generate", "Hi", "--schema", file)
        assert result.returncode == 1 and said in result.stderr and result.stderr.count("\n") <= 2


def test_a_prompt_is_the_same_from_an_argument_and_from_a_pipe(tiny):
    arguments = ["--model", tiny, "--max-tokens", 1, "--seed", 1, "--json"]
    piped, given = ossia("generate", "-", *arguments, stdin="Hi\n"), ossia("generate", "Hi", *arguments)
    assert json.loads(piped.stdout)["messages"] == json.loads(given.stdout)["messages"]


@pytest.mark.parametrize("empty", ["", "\n", "  "])
def test_an_empty_prompt_is_refused(tiny, empty):
    for result in (ossia("generate", "-", "--model", tiny, stdin=empty), ossia("generate", empty, "--model", tiny)):
        assert result.returncode == 1 and result.stderr.startswith("ossia: the prompt is empty")


@pytest.fixture(scope="module")
def adapter(tiny):
    config = Checkpoint.open(tiny).config
    made = random_adapter(config, rank=4, expert_rank=2)
    pairs = {key: pair._replace(scaling=8.0) for key, pair in made.pairs.items()}
    return write_adapter(tiny.parent / "polite", replace(made, pairs=pairs), config)


def test_an_adapter_answers_by_its_folder_or_its_name_in_the_settings(tiny, adapter, tmp_path):
    (tmp_path / "config.toml").write_text(f"[adapters]\nnice = '{adapter}'\nother = 'nowhere'")
    environ = {"OSSIA_CONFIG": str(tmp_path / "config.toml")}
    asked = ("generate", "Hi", "--model", tiny, "--seed", 1, "--max-tokens", 8, "--json", "--date", "2026-01-01")
    texts = []
    for choice in ((), ("--adapter", adapter), ("--adapter", "nice")):
        result = ossia(*asked, *choice, environ=environ)
        assert result.returncode == 0, result.stderr
        texts.append(json.loads(result.stdout)["messages"])
    assert texts[0] != texts[1] == texts[2]
    chat = ("chat", "--model", tiny, "--adapter", adapter, "--max-tokens", 8, "--show-reasoning", "--seed", 1)
    noise = ossia(*chat, stdin="Hi")
    assert noise.stdout and "the answer was cut off" in noise.stderr and "Traceback" not in noise.stderr
    nobody = ossia(*asked, "--adapter", "~nobody-at-all/polite")
    assert nobody.returncode == 1 and "there is no folder ~nobody-at-all/polite" in nobody.stderr
    wrong = ossia(*asked, "--adapter", tiny)
    assert wrong.returncode == 1 and "holds no adapter_config.json" in wrong.stderr and "Traceback" not in wrong.stderr


def test_settings_come_from_the_environment(tiny):
    result = ossia("generate", "-", "--max-tokens", 1, "--json", stdin="Hi", environ={"OSSIA_MODEL": str(tiny)})
    assert result.returncode == 0


def test_a_prompt_that_cannot_fit_is_refused_with_numbers(tiny):
    result = ossia("generate", "Hello " * 500, "--model", tiny, "--max-context", 64)
    assert result.returncode == 1 and "64" in result.stderr


def test_no_model_named_is_the_embedded_one_and_says_how_to_get_another(tmp_path):
    result = ossia("generate", "Hi", environ={"HF_HOME": str(tmp_path)})
    assert result.returncode == 0 and result.stdout
    assert "The model is nano" in result.stderr and "ossia pull" in result.stderr


@pytest.mark.parametrize("hidden", ["torch", "triton"])
def test_the_gpu_backend_without_its_packages_says_what_to_install(tiny, hidden):
    code = f"import sys; sys.modules[{hidden!r}] = None; from ossia.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "generate", "Hi", "--model", str(tiny), "--backend", "gpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"needs the package {hidden}" in result.stderr and "ossia[gpu]" in result.stderr


def test_the_gpu_backend_without_a_gpu_says_so(tiny):
    pytest.importorskip("triton", reason="Triton is not installed")
    result = ossia("generate", "Hi", "--model", tiny, "--backend", "gpu", environ={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "needs an NVIDIA GPU" in result.stderr and "--backend cpu" in result.stderr


@pytest.mark.slow
def test_the_gpu_backend_answers_as_the_reference_does(tiny):
    pytest.importorskip("triton", reason="Triton is not installed")
    asked = ("generate", "Hi", "--model", tiny, "--temperature", 0, "--max-tokens", 4, "--json")
    texts = []
    for backend in ("gpu", "reference"):
        result = ossia(*asked, "--backend", backend, environ={"TRITON_INTERPRET": "1"})
        assert result.returncode == 0, result.stderr
        texts.append(json.loads(result.stdout)["messages"])
    assert texts[0] == texts[1]


def test_pulling_without_a_network_says_so(tmp_path):
    # A closed port stands for a network that is not there.
    environ = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = ossia("pull", "gpt-oss-20b", environ=environ)
    assert result.returncode == 1 and "network" in result.stderr and "Traceback" not in result.stderr


def test_a_reader_that_leaves_early_is_no_error(tiny):
    command = f"{sys.executable} -m ossia tokenize '{'word ' * 20000}' | head -1"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr


# Speed ---------------------------------------------------------------------------------------------------------------


def test_the_machine_and_the_model_are_measured(tiny):
    arguments = ["bench", "--model", tiny, "--prefill", "8", "--depth", "0,64", "--batch", "2", "--steps", 1]
    report = json.loads(ossia(*arguments, "--repeats", 1, "--json").stdout)
    assert report["machine"]["read_bytes_per_s"] > 1e8 and report["machine"]["integer_macs_per_s"] > 1e8
    assert [one["name"] for one in report["measurements"]] == ["prefill 8", "decode at 0", "decode at 64", "decode x2"]
    table = ossia(*arguments)
    assert table.returncode == 0 and "of memory's limit" in table.stdout
    assert ossia("bench", "--model", tiny, "--depth", "deep").returncode == 2
    for option in ("--prefill", "--batch"):
        refused = ossia("bench", "--model", tiny, option, "0")
        assert refused.returncode == 2 and "expected whole numbers, 1 or more" in refused.stderr


def test_the_backend_of_the_settings_is_measured(tiny):
    nowhere = {"OSSIA_BACKEND": "gpu", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": ""}
    refused = ossia("bench", "--model", tiny, "--prefill", "8", "--depth", "", "--batch", "", environ=nowhere)
    assert refused.returncode == 1 and "GPU" in refused.stderr and not refused.stdout


def test_a_gpu_is_measured_where_there_is_one(tmp_path):
    # One layer of each kind: Triton's interpreter is slow.
    model = write_random_checkpoint(tmp_path / "tiny", "tiny", num_layers=2)
    arguments = ["bench", "--backend", "gpu", "--model", model, "--prefill", "8", "--depth", "4", "--batch", "2"]
    interpreted = {"TRITON_INTERPRET": "1"}
    report = json.loads(ossia(*arguments, "--steps", 1, "--repeats", 1, "--json", environ=interpreted).stdout)
    assert report["machine"]["copy_bytes_per_s"] > 1e8 and report["machine"]["matrix_macs_per_s"] > 1e8
    assert [one["name"] for one in report["measurements"]] == ["prefill 8", "decode at 4", "decode x2"]
    assert all(one["tokens_per_s"] > 0 for one in report["measurements"])
