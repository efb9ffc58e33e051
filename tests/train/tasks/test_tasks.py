"""Tasks: what is drawn, on which side of the split, and what an answer is worth."""

from __future__ import annotations

import ast
import random
from collections import Counter
from itertools import islice

import pytest

from ossia.cli import main
from ossia.errors import ConfigError, InputError
from ossia.harmony import Channel, Effort, Message, Role, Tokenizer, ToolNamespace, render_for_training
from ossia.tools.functions import FunctionTools, tool
from ossia.train.data import DataConfig, read_samples
from ossia.train.tasks import (
    VALID_REWARD,
    Instance,
    Reward,
    Task,
    TaskMix,
    Transcript,
    conversation,
    gold_conversation,
    gold_conversations,
    is_held_out,
    make,
    make_mix,
    namespaces,
)


class Shout(Task):
    name = "shout"

    def instance(self, rng: random.Random) -> Instance:
        word = "".join(rng.choices("abcdefgh", k=5))
        return Instance(key=word, prompt=f"Shout: {word}", answer=word.upper())


class Stuck(Shout):
    name = "stuck"

    def instance(self, rng: random.Random) -> Instance:
        return Instance("always the same", "Say so")


def final(text: str) -> Message:
    return Message(Role.ASSISTANT, text, channel=Channel.FINAL)


# Draws ---------------------------------------------------------------------------------------------------------------


def test_the_same_seed_and_number_give_the_same_draw():
    mix, again = (make_mix(["arithmetic", "calculator"]) for _ in range(2))
    drawn, repeated, other = (
        [(d.task.name, d.instance, d.effort) for d in (m.draw("train", seed, i) for i in range(50))]
        for m, seed in ((mix, 1), (again, 1), (mix, 2))
    )
    assert drawn == repeated
    assert drawn != other


def test_training_and_held_out_instances_never_meet_whatever_the_seed():
    task = make("arithmetic", {"digits": 1})
    mix = TaskMix({task: 1})
    train = {mix.draw("train", seed, i).instance.key for seed in range(2) for i in range(500)}
    held_out = {mix.draw("held_out", seed, i).instance.key for seed in range(2) for i in range(200)}
    assert held_out and not train & held_out
    # 100 sums and 55 differences of one digit; about a tenth is held out.
    assert 5 <= len(held_out) <= 30


def test_the_share_that_is_held_out_is_about_what_the_task_says():
    task = Shout()
    rng = random.Random(0)
    held_out = sum(is_held_out(task, task.instance(rng)) for _ in range(2000))
    assert 150 < held_out < 250


def test_tasks_and_efforts_are_drawn_by_their_weights():
    mix = make_mix(["arithmetic=3", "calculator"], efforts={Effort.LOW: 3, Effort.HIGH: 1})
    draws = [mix.draw("train", 0, i) for i in range(2000)]
    tasks, efforts = Counter(d.task.name for d in draws), Counter(d.effort for d in draws)
    assert 1400 < tasks["arithmetic"] < 1600
    assert 1400 < efforts[Effort.LOW] < 1600
    assert efforts[Effort.MEDIUM] == 0


def test_a_task_without_instances_on_one_side_is_an_error_and_no_endless_loop():
    task = Stuck()
    side = "train" if is_held_out(task, Instance("always the same", "")) else "held_out"
    with pytest.raises(InputError, match="stuck gave 10000 instances"):
        TaskMix({task: 1}).draw(side, 0, 0)


# Rewards -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transcript", "value", "parts"),
    [
        (Transcript((final(" ABC\n"),)), 1.0, {"exact": 1, "valid": 1, "malformed": 0}),
        (Transcript((final("abc"),)), VALID_REWARD, {"exact": 0, "valid": 1, "malformed": 0}),
        (Transcript((final("ABC"),), ("missing_end",)), 0.0, {"exact": 0, "valid": 0, "malformed": 1}),
        (Transcript((final("ABC"),), is_truncated=True), 0.0, {"exact": 0, "valid": 0, "malformed": 1}),
        (Transcript((Message(Role.ASSISTANT, "ABC", channel=Channel.ANALYSIS),)), 0.0, {"malformed": 1}),
        (Transcript(()), 0.0, {"malformed": 1}),
    ],
    ids=["right", "wrong", "malformed", "truncated", "no answer", "nothing"],
)
def test_the_reward_is_for_right_answers_less_for_wrong_ones_and_nothing_for_malformed_ones(transcript, value, parts):
    reward = Shout().score(Instance("abc", "", "ABC"), transcript)
    assert reward.value == pytest.approx(value)
    assert parts.items() <= reward.parts.items()


def test_a_check_may_be_partly_right_and_must_stay_between_0_and_1():
    class Half(Shout):
        def check(self, instance: Instance, answer: str) -> float:
            return float(answer)

    assert Half().score(Instance("a", ""), Transcript((final("0.5"),))) == Reward(
        0.55, {"exact": 0.0, "valid": 1.0, "malformed": 0.0}
    )
    with pytest.raises(InputError, match="check gave 2"):
        Half().score(Instance("a", ""), Transcript((final("2"),)))


# Gold ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arithmetic", "calculator"])
def test_gold_transcripts_earn_the_whole_reward(name):
    mix = make_mix([name])
    for number in range(200):
        draw = mix.draw("train", 5, number)
        gold = tuple(draw.task.gold(draw.instance, draw.effort))
        reward = draw.task.score(draw.instance, Transcript(gold))
        assert reward.value == 1.0, (draw.instance, gold)


def test_the_answers_of_the_tasks_are_those_of_python():
    for name, key in (("arithmetic", "key"), ("calculator", "expression")):
        for number in range(300):
            instance = make_mix([name]).draw("train", 1, number).instance
            text = instance.key if key == "key" else instance.data[key]
            assert str(eval(compile(ast.parse(text, mode="eval"), "", "eval"))) == instance.answer


def test_every_step_of_the_gold_arithmetic_is_true():
    mix = make_mix(["arithmetic"], {"digits": 6})
    for number in range(300):
        draw = mix.draw("train", 3, number)
        thought = "".join(m.text for m in draw.task.gold(draw.instance, draw.effort) if m.channel == Channel.ANALYSIS)
        assert bool(thought) == (draw.effort is not Effort.LOW)
        for step in thought.split():
            if "=" in step:
                left, right = step.split("=")
                assert eval(left) == int(right), (draw.instance, step)


def test_more_effort_thinks_longer():
    task, instance = make("arithmetic"), Instance("347+586", "?", "933", {"a": 347, "b": 586, "sign": "+"})
    lengths = [sum(len(m.text) for m in task.gold(instance, effort)) for effort in Effort]
    assert lengths == sorted(set(lengths))


def test_gold_conversations_render_for_training_and_tell_of_the_tools():
    tokenizer = Tokenizer.o200k_harmony()
    rows = list(islice(gold_conversations(make_mix(["calculator"]), "train", 0, 20), 20))
    assert len(rows) == 20
    for row in rows:
        text = tokenizer.decode(render_for_training(row, tokenizer, drop_analysis="never").token_ids)
        assert "## python" in text and text.endswith("<|return|>")
        assert " to=python<|channel|>analysis code<|message|>print(" in text


def test_functions_are_declared_to_the_developer_and_trained_tools_to_the_system():
    @tool
    def weather(city: str) -> str:
        """Tell the weather."""
        return "rain"

    class Both(Shout):
        python = True
        instructions = "Be brief."

        def tools(self, instance: Instance):
            return [FunctionTools([weather])]

    draw = TaskMix({Both(): 1}).draw("train", 0, 0)
    told = conversation(draw, namespaces(draw.task, draw.task.tools(draw.instance)))
    system, developer, user = told.messages
    assert system.content[0].tools == (ToolNamespace.python(),)
    assert system.content[0].effort == draw.effort
    assert developer.content[0].instructions == "Be brief."
    assert [space.tools[0].name for space in developer.content[0].tools] == ["weather"]
    assert user.text == draw.instance.prompt
    assert gold_conversation(draw).messages[:3] == told.messages


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_task_of_a_users_own_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "shouting_task.py").write_text(
        "from ossia.train.tasks import Instance, Task\n\n"
        "class Shout(Task):\n"
        "    name = 'shout'\n\n"
        "    def __init__(self, length=5):\n"
        "        self.length = int(length)\n\n"
        "    def instance(self, rng):\n"
        "        word = ''.join(rng.choices('abc', k=self.length))\n"
        "        return Instance(word, f'Shout: {word}', word.upper())\n"
    )
    monkeypatch.chdir(tmp_path)
    task = make("shouting_task:Shout", {"length": 7})
    assert len(task.instance(random.Random(0)).answer) == 7


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["juggling"], None, "expected one of: about, arithmetic, .*, sums, or module:Class"),
        (["no_such_module:Task"], None, "cannot be imported"),
        (["ossia.errors:InputError"], None, "is an ossia.train.tasks.Task"),
        (["arithmetic"], {"colour": "red"}, "cannot be made"),
        (["arithmetic"], {"digits": 99}, "expected 1 to 18"),
        (["arithmetic=0"], None, "weight above 0"),
        (["arithmetic=two"], None, "weight above 0"),
        (["arithmetic", "calculator"], {"digits": 2}, "expected one task"),
        (["ossia.train.tasks.base:Task"], None, "has no name"),
    ],
)
def test_a_task_that_cannot_be_had_is_an_error_that_says_what_to_do(names, options, message):
    with pytest.raises(ConfigError, match=message):
        make_mix(names, options)


def test_one_task_twice_is_refused():
    with pytest.raises(InputError, match="two tasks have one name"):
        make_mix(["arithmetic", "arithmetic"])


def test_gold_transcripts_are_written_as_data_that_training_reads(tmp_path, capsys):
    out = tmp_path / "gold.jsonl"
    flags = ["--task", "arithmetic=2,calculator", "--count", "12", "--seed", "3"]
    assert main(["train", "gold", str(out), *flags]) == 0, capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 12
    tokenizer = Tokenizer.o200k_harmony()
    samples = list(read_samples(out, DataConfig(shuffle=False), tokenizer))
    assert len(samples) == 12
    for sample in samples:
        assert sample.num_trained > 0
        assert sample.token_ids_L[-1] == tokenizer.special("<|return|>")
    assert main(["train", "gold", str(out), *flags]) == 1
    assert "is there already" in capsys.readouterr().err
