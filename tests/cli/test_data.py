"""`ossia data inspect` as a person uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say <|end|>\x1b[31m"},
        {"role": "assistant", "reasoning": "Easy.", "content": "So it is."},
    ]
}


def inspect(*arguments, **environ):
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, "-m", "ossia", "data", "inspect", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean | {"COLUMNS": "160"} | environ,
    )


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text(json.dumps(TALK) + "\n")
    return path


def test_what_is_trained_is_marked_without_colour(good):
    result = inspect(good, "--date", "2025-06-28")
    assert result.returncode == 0, result.stderr
    shown = result.stdout.splitlines()
    assert shown[0].startswith(f"{good}:1, 1 of 1: ") and shown[0].endswith("effort medium")
    assert "train analysis ┃ <|channel|>analysis<|message|>Easy.<|end|>" in shown
    assert "train final    ┃ <|start|>assistant<|channel|>final<|message|>So it is.<|return|>" in shown
    # Text that only spells a special token is not taken for one.
    assert any(line.startswith("user           ┊ <|start|>user<|message|>Say <\\|end|>") for line in shown)
    assert any(line.startswith("rows") and line.endswith(" 1") for line in shown)
    assert "\x1b[2m" not in result.stdout


def test_colours_tell_the_channels_apart_and_text_cannot_steer_the_terminal(good):
    result = inspect(good, FORCE_COLOR="1", TERM="xterm-256color")
    assert "\x1b[32m" in result.stdout and "\x1b[33m" in result.stdout and "\x1b[2m" in result.stdout
    assert "\x1b[31m" not in result.stdout and "␛[31m" in result.stdout


def test_bad_rows_are_listed_on_standard_error_and_in_the_exit_code(good):
    with good.open("a") as file:
        file.write('{"messages": 3}\n')
    result = inspect(good)
    assert result.returncode == 1
    assert f"bad row: {good}:2: messages is 3; expected a list of messages" in result.stderr
    assert "Traceback" not in result.stderr


def test_json_holds_the_counts_and_the_tokens(good):
    found = json.loads(inspect(good, "--json", "--train", "final=0.5").stdout)
    assert found["rows"] == 1 and list(found["trained"]) == ["final"]
    (shown,) = found["shown"]
    assert [run["text"] for run in shown["runs"] if run["weight"] == 0.5] == [
        "<|start|>assistant<|channel|>final<|message|>So it is.<|return|>"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "everything"], "train has 'everything'; expected all,"),
        (["--effort", "much"], "effort is 'much'"),
        (["--date", "soon"], "current_date is 'soon'; expected YYYY-MM-DD"),
    ],
)
def test_a_setting_that_is_none_is_one_clear_sentence(good, arguments, message):
    result = inspect(good, *arguments)
    assert result.returncode != 0 and message in result.stderr and "Traceback" not in result.stderr


def test_a_file_that_is_not_there_is_one_clear_sentence(tmp_path):
    result = inspect(tmp_path / "none.jsonl")
    assert result.returncode != 0 and "no such file or folder" in result.stderr and "Traceback" not in result.stderr
