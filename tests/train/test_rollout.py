"""Rollouts: tokens as they were sampled, tools in the loop, limits, rewards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.responses.scripts import Scripted, tokens
from tests.train.small import TOKENIZER as BYTES
from tests.train.small import Brief, Vowels, make_engine, write_model

from ossia import ops as backends
from ossia.errors import ContextLengthError, InputError, OssiaError, UnavailableError
from ossia.harmony import Effort, Role, Tokenizer, render_message, tool_message
from ossia.tools.functions import FunctionTools, tool
from ossia.train.rollout import Exercise, Rollout, RolloutConfig, Rollouts, rollout_seed
from ossia.train.tasks import Draw, Instance, TaskMix, make_mix
from ossia.train.tasks.calculator import Calculator

O200K = Tokenizer.o200k_harmony()
CALL = '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2, "b": 3}<|call|>'
FINAL = "<|channel|>final<|message|>5<|return|>"
THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"


class Script(Scripted):
    """As an engine that tells how likely what was drawn was."""

    async def _read(self, prompt, params):
        async for output in super()._read(prompt, params):
            yield replace(output, drawn_logprob=-0.25)


class Adding(Brief):
    name = "adding"

    def instance(self, rng):
        return Instance("2+3", "2+3", "5")

    def tools(self, instance):
        @tool
        def add(a: int, b: int) -> int:
            """Add."""
            return a + b

        @tool
        async def wait() -> str:
            """Wait for ever."""
            await asyncio.sleep(1000)
            return ""

        return [FunctionTools([add, wait])]


DRAW = Draw(Adding(), Instance("2+3", "2+3", "5"), Effort.LOW)


def play(*scripts: str, draw: Draw = DRAW, context: int = 100_000, **settings: object) -> tuple[Rollout, Script]:
    engine = Script(*scripts, context=context)

    @asynccontextmanager
    async def source():
        yield engine

    with Rollouts(source, O200K, RolloutConfig(**settings), top_logprobs=2) as rollouts:
        return rollouts.run([Exercise(draw, 1)])[0], engine


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def small(model) -> Callable[..., Rollouts]:
    def make(**config: object) -> Rollouts:
        return Rollouts(make_engine(model, backends.load("cpu")), BYTES, RolloutConfig(**config), routing=True)

    return make


# Tokens --------------------------------------------------------------------------------------------------------------


def test_a_call_is_answered_and_only_the_models_own_tokens_are_marked_as_sampled():
    rollout, engine = play(THOUGHT + CALL, FINAL)
    sampled = [tokens(THOUGHT + CALL), tokens(FINAL)]
    prompt = engine.prompts[0]
    answer = tool_message("functions.add", "commentary", "5")
    between = [*render_message(answer, O200K), O200K.special("<|start|>"), *O200K.encode("assistant")]
    assert rollout.token_ids_L.tolist() == prompt + sampled[0] + between + sampled[1]
    marks = [False] * len(prompt) + [True] * len(sampled[0]) + [False] * len(between) + [True] * len(sampled[1])
    assert rollout.sampled_L.tolist() == marks
    assert engine.prompts[1] == prompt + sampled[0] + between
    assert rollout.reward.value == 1.0
    assert rollout.num_calls == 1
    assert [one.role for one in rollout.transcript.messages] == [Role.ASSISTANT] * 2 + [Role.TOOL, Role.ASSISTANT]


def test_what_was_sampled_oddly_is_never_rendered_again():
    # The encoder would spell this as one token; header and call have a form that rendering would not give.
    odd = tokens("<|channel|>commentary to=functions.add<|message|>")
    odd += [O200K.encode(letter)[0] for letter in '{"a":2,"b":3}'] + tokens("<|call|>")
    engine = Script(odd, FINAL)

    @asynccontextmanager
    async def source():
        yield engine

    with Rollouts(source, O200K, RolloutConfig()) as rollouts:
        rollout = rollouts.run([Exercise(DRAW, 1)])[0]
    assert rollout.transcript.calls and not rollout.transcript.defects
    start = len(engine.prompts[0])
    assert rollout.token_ids_L[start : start + len(odd)].tolist() == odd
    assert engine.prompts[1][start : start + len(odd)] == odd


def test_logprobs_and_likeliest_tokens_stand_with_the_sampled_tokens():
    rollout, _ = play(CALL, FINAL)
    np.testing.assert_array_equal(rollout.drawn_logprobs_L, np.where(rollout.sampled_L, -0.25, 0))
    np.testing.assert_array_equal(rollout.model_logprobs_L, np.where(rollout.sampled_L, -0.5, 0))
    assert rollout.top_ids_RK.shape == rollout.top_logprobs_RK.shape == (rollout.num_sampled, 2)
    np.testing.assert_array_equal(rollout.top_ids_RK[:, 0], rollout.token_ids_L[rollout.sampled_L])


def test_a_rollout_as_training_data_weighs_sampled_tokens_alone():
    rollout, _ = play(CALL, FINAL)
    sample = rollout.sample()
    np.testing.assert_array_equal(sample.weights_L > 0, rollout.sampled_L)
    assert sample.effort == Effort.LOW


# Limits and defects --------------------------------------------------------------------------------------------------


def test_an_exercise_that_runs_out_of_tokens_is_truncated_and_worth_nothing():
    rollout, _ = play(CALL, FINAL, max_tokens=len(tokens(CALL)) + 2)
    assert rollout.transcript.is_truncated
    assert rollout.num_sampled == len(tokens(CALL)) + 2
    assert rollout.reward.value == 0
    assert rollout.reward.parts["malformed"] == 1


def test_an_answer_of_a_tool_that_leaves_no_room_ends_the_exercise_with_what_was_sampled():
    first = len(play(CALL, FINAL)[1].prompts[0])
    rollout, engine = play(CALL, FINAL, context=first + len(tokens(CALL)) + 3)
    assert rollout.transcript.is_truncated
    assert len(engine.prompts) == 1
    assert rollout.sampled_L[-1] and len(rollout.token_ids_L) == first + len(tokens(CALL))


def test_a_server_that_tells_its_context_only_by_refusing_ends_that_exercise_alone():
    class Server(Script):
        def check(self, token_ids, params):
            return 1 << 30

        async def generate(self, token_ids, params, **_):
            if len(token_ids) > self.context:
                raise ContextLengthError("the prompt is too long")
            async for output in self._read(token_ids, params):
                yield output

    first = len(play(CALL, FINAL)[1].prompts[0])
    engine = Server(CALL, FINAL, context=first + len(tokens(CALL)))

    @asynccontextmanager
    async def source():
        yield engine

    with Rollouts(source, O200K, RolloutConfig(), top_logprobs=2) as rollouts:
        rollout = rollouts.run([Exercise(DRAW, 1)])[0]
    assert rollout.transcript.is_truncated and rollout.num_sampled == len(tokens(CALL))


def test_a_prompt_that_never_fits_is_an_error():
    with pytest.raises(ContextLengthError):
        play(FINAL, context=5)


def test_calls_beyond_the_limit_end_the_exercise():
    rollout, engine = play(CALL, max_calls=2)
    assert rollout.transcript.is_truncated
    assert rollout.num_calls == 2
    assert len(engine.prompts) == 3


@pytest.mark.parametrize(
    ("scripts", "defect"),
    [
        (["<|channel|>commentary to=functions.fly <|constrain|>json<|message|>{}<|call|>", FINAL], "unknown_tool"),
        (["<|channel|>final<|message|>5<|call|>"], "call_of_nothing"),
        (["<|channel|>analysis<|message|>5<|return|>"], "no_answer"),
        (["<|channel|>final<|message|>5<|endoftext|>"], "no_return"),
        (["5<|return|>"], "missing_message"),
    ],
)
def test_what_is_malformed_is_named_and_worth_nothing(scripts, defect):
    rollout, _ = play(*scripts)
    assert defect in rollout.transcript.defects
    assert rollout.reward.value == 0


def test_an_unknown_tool_is_answered_with_the_tools_there_are():
    rollout, _ = play("<|channel|>commentary to=functions.fly <|constrain|>json<|message|>{}<|call|>", FINAL)
    assert rollout.transcript.messages[1].text == (
        "Unknown tool: functions.fly. The tools are: functions.add, functions.wait."
    )


def test_a_tool_that_does_not_answer_is_left_after_its_time():
    call = "<|channel|>commentary to=functions.wait <|constrain|>json<|message|>{}<|call|>"
    rollout, _ = play(call, FINAL, tool_timeout_s=0.05)
    assert rollout.transcript.messages[1].text == "Error: functions.wait gave no answer within 0.05 seconds"


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", 0), ("max_python", 0), ("temperature", -0.1), ("temperature", float("nan"))]
)
def test_a_setting_that_cannot_be_is_named(field, value):
    with pytest.raises(InputError) as caught:
        RolloutConfig(**{field: value})
    assert caught.value.param == field


def test_a_score_outside_of_0_to_1_is_an_error():
    class Generous(Adding):
        def score(self, instance, transcript):
            return super().score(instance, transcript)._replace(value=2.0)

    with pytest.raises(InputError, match="score gave 2"):
        play(FINAL, draw=DRAW._replace(task=Generous()))


def test_an_error_of_the_engine_comes_out_and_ends_the_others():
    class Broken(Script):
        async def _read(self, prompt, params):
            raise OssiaError("the logits are not finite")
            yield

    engine = Broken(FINAL)

    @asynccontextmanager
    async def source():
        yield engine

    with Rollouts(source, O200K, RolloutConfig()) as rollouts, pytest.raises(OssiaError, match="not finite"):
        rollouts.run([Exercise(DRAW, i) for i in range(3)])


# With an engine ------------------------------------------------------------------------------------------------------


def exercises(count: int, group: int) -> list[Exercise]:
    mix = TaskMix({Vowels(): 1})
    return [Exercise(mix.draw("train", 0, i), rollout_seed(0, i, j)) for i in range(count) for j in range(group)]


def same(a: Rollout, b: Rollout) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("token_ids_L", "sampled_L", "drawn_logprobs_L", "model_logprobs_L", "routing_LA")
    )


def test_the_same_seeds_give_the_same_rollouts_alone_or_together(small):
    with small(max_tokens=20) as rollouts:
        together = rollouts.run(exercises(3, 4))
        alone = [rollouts.run([one])[0] for one in exercises(3, 4)]
    assert all(map(same, together, alone))
    assert len({one.token_ids_L.tobytes() for one in together}) == 12


def test_a_group_computes_its_prompt_once(model):
    engine = make_engine(model, backends.load("cpu"), block_size=4)
    with Rollouts(engine, BYTES, RolloutConfig(max_tokens=20)) as rollouts:
        done = rollouts.run(exercises(1, 8))
    computed = engine.stats().totals.num_computed_tokens
    prompt = int((~done[0].sampled_L).sum())
    # But for a part of a block, and the last token of each, which is never computed.
    assert computed <= prompt + 8 * (4 + 20)


def test_every_token_but_the_last_has_its_experts(small):
    with small(max_tokens=20) as rollouts:
        for rollout in rollouts.run(exercises(2, 2)):
            assert rollout.routing_LA.shape == (len(rollout.token_ids_L) - 1, 2, 2)


def test_with_a_grammar_nothing_malformed_is_sampled_even_from_noise(small):
    with small(max_tokens=400, grammar=True) as rollouts:
        done = rollouts.run(exercises(4, 4))
    assert all(not one.transcript.defects or one.transcript.is_truncated for one in done)
    finished = [one for one in done if not one.transcript.is_truncated]
    assert finished
    for one in finished:
        assert one.transcript.answer is not None
        assert (one.drawn_logprobs_L[one.sampled_L] >= one.model_logprobs_L[one.sampled_L] - 1e-5).all()


def test_with_a_grammar_answers_match_their_schema_even_from_noise(small):
    mix = make_mix(["structured"])
    with small(max_tokens=600, grammar=True) as rollouts:
        done = rollouts.run([Exercise(mix.draw("train", 0, i), rollout_seed(0, i, 0)) for i in range(6)])
    finished = [one for one in done if not one.transcript.is_truncated]
    assert finished
    for one in finished:
        assert list(json.loads(one.transcript.answer)) == list(one.draw.instance.data["expected"])


def test_python_runs_in_a_sandbox_of_each_exercise():
    # Sets a variable and shows it: another exercise must not see it.
    draw = Draw(Calculator(), Instance("1", "1", "7"), Effort.LOW)
    code = "<|channel|>analysis to=python code<|message|>x = globals().get('x', 6) + 1; print(x)<|call|>"
    final = "<|channel|>final<|message|>7<|return|>"

    class Both(Script):
        def generate(self, token_ids, params):
            self.check(token_ids, params)
            text = O200K.decode(token_ids)
            self.scripts = [tokens(final if "python to=assistant" in text else code)]
            return self._read(list(token_ids), params)

    engine = Both(code)

    @asynccontextmanager
    async def source():
        yield engine

    with Rollouts(source, O200K, RolloutConfig(max_python=2)) as rollouts:
        for _ in range(2):
            try:
                done = rollouts.run([Exercise(draw, i) for i in range(5)])
            except UnavailableError as error:
                pytest.skip(error.message)
            assert [one.transcript.messages[1].text for one in done] == ["7"] * 5
            assert [one.reward.value for one in done] == [1.0] * 5
            assert [one.reward.parts["called"] for one in done] == [1.0] * 5
