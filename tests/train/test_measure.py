"""Measuring tasks: intervals, shares, means."""

from __future__ import annotations

import json
import re
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from tests.responses.scripts import TOKENIZER, Scripted, tokens
from tests.train.small import Brief, write_model

from ossia.errors import ConfigError, InputError
from ossia.harmony import Effort
from ossia.train.measure import Log, measure, open_rollouts, wilson
from ossia.train.rollout import RolloutConfig, Rollouts
from ossia.train.tasks import Instance

SAID = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"


class Odd(Brief):
    """Says whether a number is odd; the script below knows it of every number but those that end in 7."""

    name = "odd"

    def instance(self, rng):
        number = rng.randrange(10_000)
        return Instance(str(number), str(number), "odd" if number % 2 else "even")


class Student(Scripted):
    async def _read(self, prompt, params):
        number = re.findall(r"\d+", TOKENIZER.decode(prompt))[-1]
        answer = "odd" if int(number) % 2 and number[-1] != "7" else "even"
        self.scripts = [tokens(SAID.format(answer))]
        async for output in super()._read(prompt, params):
            yield replace(output, drawn_logprob=-0.25)


STUDENTS: list[Student] = []


def play(count: int, max_tokens: int = 500, **more):
    @asynccontextmanager
    async def source():
        student = Student("<|return|>")
        STUDENTS.append(student)
        yield student

    with Rollouts(source, TOKENIZER, RolloutConfig(temperature=0, max_tokens=max_tokens)) as rollouts:
        return measure(rollouts, Odd(), Effort.LOW, count, **more)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (970, 1000, 0.9575, 0.9789)],
)
def test_intervals_are_wilsons(right, count, low, high):
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


def test_shares_and_means_are_those_of_the_exercises():
    found = play(300)
    assert found.task == "odd"
    assert found.effort == "low"
    assert found.num_exercises == 300
    assert found.exact == pytest.approx(0.9, abs=0.06)
    assert found.low < found.exact < found.high
    assert (found.valid, found.unfinished, found.defects) == (1, 0, {})
    assert found.sampled == len(tokens(SAID.format("odd")))
    assert found.reasoning == len(TOKENIZER.encode("Hm."))
    assert found.parts["exact"] == pytest.approx(found.exact)
    assert play(300) == found
    assert play(300, seed=1).exact != found.exact


def test_what_a_limit_ends_is_unfinished_and_not_valid():
    found = play(20, max_tokens=len(tokens(SAID.format("odd"))) - 2)
    assert (found.valid, found.unfinished, found.exact) == (0, 1, 0)


def test_exercises_that_are_kept_are_not_done_again(tmp_path):
    path, how = tmp_path / "kept" / "odd.jsonl", {"model": "a", "seed": 0}
    whole = play(70)
    assert play(40, log=Log(path, how)) == play(40)
    # Broken off within a line.
    with open(path, "a") as file:
        file.write('{"task": "odd", "eff')
    assert play(70, log=Log(path, how)) == whole
    assert len(STUDENTS[-1].prompts) == 30
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"how": how} and [one["number"] for one in lines[1:]] == list(range(70))
    assert all(one["text"].endswith("<|return|>") and one["task"] == "odd" for one in lines[1:])
    assert sum(one["right"] for one in lines[1:]) == round(whole.exact * 70)
    # Fewer are the first of them.
    assert play(40, log=Log(path, how)) == play(40)
    with pytest.raises(ConfigError, match="seed was 0, now 1; give another name"):
        Log(path, {**how, "seed": 1})


@pytest.mark.parametrize(
    "text", ["no JSON\n", "one line", "[1]\n", '{"how": {}}\n{"task": "odd"}\n', '{"how": {}}\n5\n']
)
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no file of measured exercises"):
        Log(path, {})
    assert path.read_text() == text


def test_a_count_below_one_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        play(0)


def test_a_checkpoint_is_measured_by_the_engine(tmp_path):
    model = write_model(tmp_path / "model")
    with open_rollouts(model, RolloutConfig(temperature=0, max_tokens=8), threads=1, kv_memory=32 << 20) as rollouts:
        found = measure(rollouts, Odd(), Effort.LOW, 5)
    assert found.exact == 0
    assert found.valid == 0
    assert 1 <= found.sampled <= 8


class Caller(Student):
    """Calls twice what is not there, and then answers; where the number ends in 7 it ends with a call all the same."""

    async def _read(self, prompt, params):
        text = TOKENIZER.decode(prompt)
        number = re.findall(r"message\|>(\d+)<", text)[0]
        if text.count("Unknown tool") == 2 and number[-1] != "7":
            said = SAID.format("odd")
        else:
            said = "<|channel|>commentary to=functions.odd <|constrain|>json<|message|>{}<|call|>"
            if text.count("Unknown tool") == 2:
                said = said.replace("<|call|>", "<|return|>")
        self.scripts = [tokens(said)]
        async for output in Scripted._read(self, prompt, params):
            yield replace(output, drawn_logprob=-0.25)


def test_what_broke_the_format_is_told_by_the_share_of_transcripts():
    @asynccontextmanager
    async def source():
        yield Caller("<|return|>")

    with Rollouts(source, TOKENIZER, RolloutConfig(temperature=0, max_tokens=500)) as rollouts:
        found = measure(rollouts, Odd(), Effort.LOW, 40)
    assert (found.valid, found.unfinished) == (0, 0)
    assert found.defects.pop("unknown_tool") == 1
    assert 0 < found.defects["no_answer"] < 0.4
