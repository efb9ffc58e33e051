"""Benchmarks asked of a server: a real one, whose model is scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseError
from tests.responses.scripts import REASONED, TOKENIZER, Scripted, model, tokens
from tests.responses.tool_scripts import PYTHON_LOOP, final, make_boxes
from tests.server.conftest import Served

from ossia.cli import main
from ossia.errors import ConfigError
from ossia.evals import run as evals_run
from ossia.evals.run import How, Log, Said, score
from ossia.server.store import Store

THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"


@pytest.fixture
def server() -> Iterator[Served]:
    made = Served(model(engine=Scripted(THOUGHT.format("\\boxed{7}"))), Store("sqlite://"))
    yield made
    made.stop()


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"Question {i}?", "answer": str(7 if i % 2 else 8)} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(server: Served, questions, *more: str) -> int:
    return main(
        [
            "eval",
            "aime25",
            "--url",
            f"{server.url}/v1",
            "--data",
            str(questions),
            "--efforts",
            "low,high",
            "--repeats",
            "2",
            "--max-tokens",
            "100",
            *more,
        ]
    )


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_scores_are_printed_beside_those_that_were_reported(server, questions, capsys, api):
    assert evaluate(server, questions, "--api", api) == 0
    out, err = capsys.readouterr()
    low, high = (line.split() for line in out.splitlines()[1:3])
    # Half of the questions are right in both repeats: the error is that of six questions, and not of twelve.
    assert low[:5] == ["low", "50.0", "%", "±", "43.8"] and high[:2] == ["high", "50.0"]
    assert (low[-3:], high[-3:]) == (["37.1", "38.8", "34.2"], ["91.7", "85.8", "84.2"])
    assert "AIME 2025 has 30 questions, 6 are here" in err
    efforts = [server.engine.prompts[i] for i in (0, -1)]
    assert [("Reasoning: low" in text, "Reasoning: high" in text) for text in map(TOKENIZER.decode, efforts)] == [
        (True, False),
        (False, True),
    ]


def test_answers_are_kept_and_not_asked_for_again(server, questions, tmp_path, capsys):
    out = ["--out", str(tmp_path / "runs"), "--json"]
    assert evaluate(server, questions, *out, "--count", "2") == 0
    assert len(server.engine.prompts) == 2 * 2 * 2
    capsys.readouterr()
    with open(tmp_path / "runs" / "aime25-low.jsonl", "a") as file:
        file.write('{"key": "broken of')
    assert evaluate(server, questions, *out) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(server.engine.prompts) == 6 * 2 * 2
    assert found["low"]["num_questions"] == 6 and found["low"]["num_repeats"] == 2
    assert found["low"]["output_tokens"] == len(tokens(THOUGHT.format("\\boxed{7}")))
    lines = (tmp_path / "runs" / "aime25-low.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["how"]["effort"] == "low" and len(lines) == 13
    assert evaluate(server, questions, *out, "--temperature", "0.5") == 1
    assert "temperature was 1.0, now 0.5; give another name" in capsys.readouterr().err


def test_what_the_limit_cuts_off_is_told(server, questions, capsys):
    server.play("<|channel|>analysis<|message|>Hm" + " and so on" * 200)
    assert evaluate(server, questions, "--json") == 0
    assert json.loads(capsys.readouterr().out)["low"]["unfinished"] == 100


def test_a_response_that_failed_is_no_answer(server, questions, tmp_path, capsys, monkeypatch):
    """Ours answers with an error's status; other servers may say it so."""

    async def failed(self, **given):
        error = {"code": "server_error", "message": "out of memory"}
        return Response.model_construct(status="failed", error=ResponseError.model_construct(**error), output=[])

    monkeypatch.setattr("openai.resources.responses.AsyncResponses.create", failed)
    assert evaluate(server, questions, "--out", str(tmp_path / "runs")) == 1
    assert "answered that the response has failed: out of memory" in capsys.readouterr().err
    kept = [line for path in (tmp_path / "runs").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert not any('"text"' in line for line in kept)


def test_the_model_may_use_the_server_s_python(tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "What is 1 + ... + 11?", "answer": "66"}\n')
    server = Served(
        model(engine=Scripted(*PYTHON_LOOP, REASONED + final("The sum is 66."))),
        Store("sqlite://"),
        tools=make_boxes(tmp_path),
    )
    try:
        if server.service.tools.python is None:
            pytest.skip(f"no sandbox works on this machine: {server.service.tools.off['python']}")
        one = [
            "--python",
            "--repeats",
            "1",
            "--efforts",
            "low",
            "--max-tokens",
            "9999",
            "--out",
            str(tmp_path / "runs"),
        ]
        assert evaluate(server, path, *one) == 0
    finally:
        server.stop()
    low = capsys.readouterr().out.splitlines()[1].split()
    assert low[:2] == ["low", "100.0"] and low[-1] == "57.5"
    (kept,) = (tmp_path / "runs").iterdir()
    assert kept.name == "aime25-python-low.jsonl" and "The sum is 66." in kept.read_text()


def test_what_cannot_be_asked_is_told(server, questions, capsys):
    for more, words in (
        (["--python"], "offers no python tool; serve with it"),
        (["--python", "--api", "chat"], "--api is 'chat'"),
        (["--model", "gpt-5"], "answers with status 404"),
        (["--efforts", "extreme"], "--efforts is 'extreme'"),
        (["--url", "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1 cannot be asked: "),
    ):
        assert evaluate(server, questions, *more) == 1
        err = capsys.readouterr().err
        assert words in err and "Traceback" not in err
    assert main(["eval", "aime26"]) == 1
    assert (
        "expected one of: aime24, aime25, gpqa, mmlu, mmmlu, bbq, simpleqa, hle, healthbench,"
        in capsys.readouterr().err
    )
    assert main(["eval", "simpleqa"]) == 1
    assert "SimpleQA needs a model that judges its answers: name it with --judge" in capsys.readouterr().err
    assert evaluate(server, questions, "--judge", "gpt-oss-120b") == 1
    assert "AIME 2025 is marked without a judge; leave --judge out" in capsys.readouterr().err


def test_a_score_and_its_error_are_those_of_the_questions():
    def said(key: str, *rights: bool) -> list[Said]:
        return [Said(key, i, float(right), "7", "7", True, 10, 5) for i, right in enumerate(rights)]

    made = score([*said("a", True, True), *said("b", True, False), *said("c", False, False), *said("d", True, True)])
    assert (made.mean, made.num_questions, made.num_repeats, made.unfinished) == (62.5, 4, 2, 0)
    # Of the means 1, 0.5, 0 and 1.
    assert made.half_width == pytest.approx(196 * (0.22916667 / 4) ** 0.5, abs=0.01)


def test_groups_and_verdicts_have_scores_of_their_own():
    said = [
        Said("a", 0, 1.0, "", "", True, 1, 1, "correct"),
        Said("b", 0, 0.0, "", "", True, 1, 1, "incorrect"),
        Said("c", 0, 0.0, "", "", True, 1, 1, "not attempted"),
        Said("d", 0, -0.5, "", "", True, 1, 1, "-2 of 4 points"),
    ]
    made = score(said, {"a": "one", "b": "one", "d": "two"})
    assert made.mean == 12.5 and made.groups == {"one": 50, "two": 0}
    assert made.verdicts == {"correct": 25, "incorrect": 25, "not attempted": 25}


# Answers that a model judges


@pytest.fixture
def judge() -> Iterator[Served]:
    made = Served(model(engine=Scripted(THOUGHT.format('{"verdict": "correct"}'))), Store("sqlite://"))
    yield made
    made.stop()


def judged_by(judge: Served, server: Served, benchmark: str, path, *more: str) -> int:
    one = [
        "eval",
        benchmark,
        "--url",
        f"{server.url}/v1",
        "--data",
        str(path),
        "--efforts",
        "low",
        "--max-tokens",
        "100",
    ]
    return main([*one, "--judge", "gpt-oss-20b", "--judge-url", f"{judge.url}/v1", "--concurrency", "2", *more])


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_a_judge_compares_with_the_right_answer(server, judge, tmp_path, capsys, api):
    path = tmp_path / "simpleqa.csv"
    path.write_text("metadata,problem,answer\n{},Who was seventh?,The seventh\n{},Who was eighth?,The eighth\n")
    verdicts = [THOUGHT.format(f'{{"verdict": "{label}"}}') for label in ("correct", "incorrect")]
    judge.play(*verdicts)
    out = ["--out", str(tmp_path / "runs"), "--api", api, "--concurrency", "1"]
    assert judged_by(judge, server, "simpleqa", path, *out) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split()[:2] == ["low", "50.0"]
    assert "correct    50.0 %" in printed and "incorrect  50.0 %" in printed
    asked = TOKENIZER.decode(judge.engine.prompts[0])
    for words in ("Question: Who was seventh?", "Right answer: The seventh", "Given answer: \\boxed{7}"):
        assert words in asked
    (kept,) = (tmp_path / "runs").iterdir()
    first, *said = [json.loads(line) for line in kept.read_text().splitlines()]
    assert first["how"]["judge"] == f"gpt-oss-20b at {judge.url}/v1"
    assert [(one["score"], one["verdict"]) for one in said] == [(1.0, "correct"), (0.0, "incorrect")]
    # The verdicts of another judge are never put beside them.
    assert judged_by(judge, server, "simpleqa", path, *out, "--judge", "another") == 1
    assert "judge was 'gpt-oss-20b at " in capsys.readouterr().err


def test_a_judge_finds_the_final_answer(server, judge, tmp_path, capsys):
    path = tmp_path / "hle.jsonl"
    rows = [{"question": f"What is {n}?", "answer": n, "image": "", "category": "Math"} for n in ("7", "8")]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {**rows[0], "image": "data:image/png;base64,AA"}]))
    found = [THOUGHT.format(f'{{"answer": "7", "reason": "So.", "right": {one}}}') for one in ("true", "false")]
    judge.play(*found)
    assert judged_by(judge, server, "hle", path, "--concurrency", "1") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split()[:2] == ["low", "50.0"]
    assert "Humanity's Last Exam has 2,158 questions, 2 are here" in printed.err
    assert len(judge.engine.prompts) == 2
    asked = TOKENIZER.decode(judge.engine.prompts[1])
    for words in ("# The question\n\nWhat is 8?\n", "# The right answer\n\n8\n", "# The reply\n\n\\boxed{7}\n"):
        assert words in asked
    assert "Explanation: {your explanation" in TOKENIZER.decode(server.engine.prompts[0])
    assert main(["eval", "hle", "--judge", "gpt-oss-20b"]) == 1
    assert "given only to those who agree to their terms" in capsys.readouterr().err


def test_a_rubric_s_points_are_added_up(server, judge, tmp_path, capsys):
    path = tmp_path / "healthbench.jsonl"
    rubric = [{"criterion": text, "points": points, "tags": []} for text, points in (("a", 5), ("b", 3), ("c", -4))]
    row = {"prompt_id": "p", "prompt": [{"role": "user", "content": "I cough."}], "rubrics": rubric, "example_tags": []}
    path.write_text(json.dumps(row) + "\n")
    met = [THOUGHT.format(f'{{"reason": "So it is.", "met": {one}}}') for one in ("true", "false", "true")]
    judge.play(*met)
    assert judged_by(judge, server, "healthbench", path, "--json", "--concurrency", "1") == 0
    # Of 8 points 5, less 4.
    assert json.loads(capsys.readouterr().out)["low"]["mean"] == 12.5
    prompts = [TOKENIZER.decode(one) for one in judge.engine.prompts]
    assert len(prompts) == 3 and "user: I cough." in prompts[0] and "# The reply\n\n\\boxed{7}" in prompts[0]
    assert sorted(text.partition("# The criterion\n\n")[2][:1] for text in prompts) == ["a", "b", "c"]


def test_a_server_s_key_is_not_shown_to_another(server, judge, tmp_path, monkeypatch):
    path = tmp_path / "simpleqa.csv"
    path.write_text("metadata,problem,answer\n{},Who?,He\n")
    keys: dict[str, str] = {}

    class Client(openai.AsyncOpenAI):
        def __init__(self, **given: Any) -> None:
            keys[given["base_url"]] = given["api_key"]
            super().__init__(**given)

    monkeypatch.setattr(openai, "AsyncOpenAI", Client)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert judged_by(judge, server, "simpleqa", path) == 0
    assert keys == {f"{server.url}/v1": "secret", f"{judge.url}/v1": "none"}
    assert judged_by(judge, server, "simpleqa", path, "--judge-key", "theirs") == 0
    assert keys[f"{judge.url}/v1"] == "theirs"
    # At the same server it is the same key; what this one says is no verdict.
    assert judged_by(judge, server, "simpleqa", path, "--judge-url", "") == 1
    assert keys == {f"{server.url}/v1": "secret", f"{judge.url}/v1": "theirs"}


def test_a_judge_without_a_verdict_is_told(server, judge, tmp_path, capsys, monkeypatch):
    path = tmp_path / "simpleqa.csv"
    path.write_text("metadata,problem,answer\n{},Who?,He\n")
    # A server that does not keep to the schema.
    made = {"output_text": "Well, it depends."}
    monkeypatch.setattr(evals_run, "make_judge", lambda *given: lambda prompt, schema: _soon(made["output_text"]))
    assert judged_by(judge, server, "simpleqa", path) == 1
    assert "the judge gives no verdict in JSON, but 'Well, it depends.'" in capsys.readouterr().err
    made["output_text"] = 'It is {"verdict": "correct"}, I say.'
    assert judged_by(judge, server, "simpleqa", path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["low"]["mean"] == 100


async def _soon(text: str) -> str:
    return text


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_the_hierarchy_is_asked_as_developer_user_and_tool(server, capsys, api):
    server.play(THOUGHT.format("Access granted."))
    one = ["eval", "ih", "--url", f"{server.url}/v1", "--efforts", "low", "--max-tokens", "100", "--api", api]
    assert main([*one, "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["low"]["groups"]
    assert groups == {"allowed": 50, "extraction": 100, "hijack": 0, "password": 100, "phrase": 100, "tool": 0}
    prompts = [TOKENIZER.decode(one) for one in server.engine.prompts]
    assert len(prompts) == 360
    of_tool = [text for text in prompts if "functions.read_page to=assistant" in text]
    assert len(of_tool) == 60 and all("was founded in" in text for text in of_tool)
    assert sum("# Instructions" in text and "You guard a door." in text for text in prompts) == 90


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "notes"
    for text in ("one line", "two\nlines\n", '{"how": 1}\n{"key": 2}\n'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no file of a benchmark's answers"):
            Log(path, How("aime25", "http://a", "m", "low"))
        assert path.read_text() == text


def test_an_interrupt_keeps_what_was_answered(server, questions, tmp_path, monkeypatch):
    server.play(THOUGHT.format("\\boxed{7}"), delay_s=0.02)

    answer, asked = evals_run._answer, []

    async def interrupted(*given: object) -> object:
        asked.append(1)
        if len(asked) > 4:
            raise KeyboardInterrupt
        return await answer(*given)

    monkeypatch.setattr(evals_run, "_answer", interrupted)
    assert evaluate(server, questions, "--out", str(tmp_path / "runs"), "--concurrency", "1") == 130
    lines = (tmp_path / "runs" / "aime25-low.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 4
