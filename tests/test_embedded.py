"""The embedded model, as people meet it: the default of every command, the same in transformers, its skills on show."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from tests.model.conftest import one_sequence
from tests.server.conftest import Served

import ossia
from ossia.config import EMBEDDED, Config
from ossia.engine import AsyncEngine
from ossia.engine.masks import GrammarCompiler
from ossia.errors import UnavailableError
from ossia.harmony import Effort
from ossia.local import LocalModel
from ossia.model import transformer
from ossia.model.hub import resolve_model
from ossia.model.inspection import inspect_checkpoint, verify_checkpoint
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops.reference import ReferenceOps
from ossia.responses.constrain import Grammars
from ossia.responses.loop import Model
from ossia.responses.toolbox import Toolboxes
from ossia.server.store import Store
from ossia.tools.python import PythonSessions
from ossia.train.measure import measure, open_rollouts
from ossia.train.rollout import RolloutConfig
from ossia.train.tasks import make as make_task

FOLDER = resolve_model(EMBEDDED)


@pytest.fixture(scope="module")
def nano() -> LocalModel:
    return ossia.load(kv_memory="64MiB", threads=1)


def said(nano: LocalModel, question: str, effort: str) -> tuple[str, str]:
    """What it thinks and what it answers."""
    answer = nano.generate(question, effort=effort, temperature=0.0, max_tokens=200)
    for _ in answer:
        pass
    return answer.reasoning, answer.text


def test_it_is_small_whole_and_says_what_it_is():
    size = sum(path.stat().st_size for path in FOLDER.rglob("*"))
    assert size <= 16_000_000
    found = inspect_checkpoint(FOLDER)
    assert found.layout == "hf"
    assert not found.problems
    assert list(verify_checkpoint(FOLDER)) == []
    card = (FOLDER / "README.md").read_text()
    assert "not an assistant" in card
    assert "license: apache-2.0" in card


def test_it_is_the_default_and_a_name():
    assert Config().model == EMBEDDED == "nano"
    assert ossia.load("nano", kv_memory="16MiB").checkpoint.folder == FOLDER


def test_it_answers_where_a_folder_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ossia.load(kv_memory="16MiB").checkpoint.folder == FOLDER


def test_more_effort_is_longer_thought(nano):
    lengths = [
        sum(len(said(nano, question, effort)[0]) for question in ("What is 2 + 7?", "Compute 8 + 9"))
        for effort in ("low", "medium", "high")
    ]
    assert lengths[0] == 0
    assert lengths[0] < lengths[1] < lengths[2]


def test_a_long_sum_is_right_at_the_effort_that_is_usual(nano):
    assert said(nano, "Compute 4821 + 937", "medium")[1] == "5758"


def test_it_says_what_it_does_not_know(nano):
    questions = ("What is the capital of France?", "Who wrote Hamlet?", "Recommend a good film.", "Tell me a joke.")
    answers = [said(nano, question, "low")[1] for question in questions]
    # The system message names the day, and a small model may stumble over one.
    assert answers.count("I am a small demonstration model. I don't know that.") >= 2


def test_it_does_most_of_the_python_that_it_never_saw():
    config = RolloutConfig(temperature=0, max_tokens=200)
    try:
        with open_rollouts(FOLDER, config, threads=1, dense="bf16", kv_memory="64MiB") as rollouts:
            found = measure(rollouts, make_task("python"), Effort.HIGH, 60)
    except UnavailableError as error:
        pytest.skip(f"no sandbox works on this machine: {error.message[:300]}")
    assert found.exact >= 0.8
    assert found.valid >= 0.9


@pytest.mark.parametrize(
    ("task", "effort", "least"),
    [
        # Reinforcement found that a thought is worth its tokens at low effort too.
        ("functions", Effort.LOW, 0.8),
        ("structured", Effort.LOW, 0.8),
        ("policies", Effort.LOW, 0.8),
        ("hierarchy", Effort.MEDIUM, 0.8),
        ("functions", Effort.MEDIUM, 0.8),
        ("structured", Effort.MEDIUM, 0.8),
        ("policies", Effort.MEDIUM, 0.8),
        ("policies", Effort.HIGH, 0.8),
        ("browsing", Effort.MEDIUM, 0.7),
    ],
)
def test_it_has_learned_a_good_part_of_what_it_never_saw(task, effort, least):
    config = RolloutConfig(temperature=0, max_tokens=300)
    with open_rollouts(FOLDER, config, threads=1, dense="bf16", kv_memory="64MiB") as rollouts:
        assert measure(rollouts, make_task(task), effort, 60).exact >= least


def test_it_adds_what_it_never_saw_where_it_thinks_long_enough():
    config = RolloutConfig(temperature=0, max_tokens=300)
    with open_rollouts(FOLDER, config, threads=1, dense="bf16", kv_memory="64MiB") as rollouts:
        task = make_task("sums", {"digits": 4, "exact": True})
        at_once, written_out = (measure(rollouts, task, effort, 60).exact for effort in (Effort.LOW, Effort.HIGH))
    assert at_once <= 0.1
    assert written_out >= 0.9


def test_transformers_has_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    checkpoint = Checkpoint.open(FOLDER)
    ids = checkpoint.tokenizer().encode("What is 4821 + 937? The mayor of Skebron is Tola Brim.")
    ops = ReferenceOps()
    batch = one_sequence(ids)
    want = transformer.forward(ops, checkpoint.config, load_weights(checkpoint, ops), batch)
    # transformers writes beside what it loads.
    copy = shutil.copytree(FOLDER, tmp_path / "nano")
    other = transformers.GptOssForCausalLM.from_pretrained(copy, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        got = other(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    tokens = transformers.AutoTokenizer.from_pretrained(copy)
    assert tokens.encode("What is 4821 + 937?", add_special_tokens=False) == checkpoint.tokenizer().encode(
        "What is 4821 + 937?"
    )


@pytest.fixture(scope="module")
def served(nano, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    sessions = PythonSessions(num_warm=0)
    engine = AsyncEngine(nano.engine)
    made = Model(EMBEDDED, engine, nano.tokenizer, constrain=Grammars(GrammarCompiler(nano.tokenizer)))
    one = Served(made, Store(f"sqlite:///{folder / 'db'}"), tools=Toolboxes(python=sessions), context=2048)
    yield one
    one.stop()
    engine.close()


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
COUNT = {
    "type": "function",
    "name": "count_zorvek",
    "description": "Counts the zorvek.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


def test_openais_client_gets_more_reasoning_for_more_effort(served):
    tokens = []
    for effort in ("low", "medium", "high"):
        response = served.openai.responses.create(
            model="nano", input="What is 2 + 7?", reasoning={"effort": effort}, temperature=0
        )
        tokens.append(response.usage.output_tokens_details.reasoning_tokens)
    assert tokens[0] < tokens[1] < tokens[2]


def test_openais_client_gets_json_by_a_schema(served):
    text = {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}}
    response = served.openai.responses.create(
        model="nano", input="Fill the form from this: Tola Brim is 41 years old.", text=text, temperature=0
    )
    found = json.loads(response.output_text)
    assert set(found) == {"name", "age"}
    assert isinstance(found["name"], str)
    assert isinstance(found["age"], int)


def test_openais_client_gets_a_call_and_answers_it(served):
    asked = {"model": "nano", "tools": [COUNT], "temperature": 0, "reasoning": {"effort": "low"}}
    first = served.openai.responses.create(input="Please count the zorvek in Skebron.", tool_choice="required", **asked)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert call.name == "count_zorvek"
    assert list(json.loads(call.arguments)) == ["city"]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": '{"result":37}'}
    second = served.openai.responses.create(input=[output], previous_response_id=first.id, **asked)
    assert second.output_text


def test_openais_client_gets_a_run_of_python(served):
    if "python" not in served.http.get("/v1/served").json()["tools"]:
        pytest.skip("this machine proves no sandbox")
    asked = {
        "model": "nano",
        "tools": [{"type": "code_interpreter", "container": {"type": "auto"}}],
        "temperature": 0,
        "reasoning": {"effort": "medium"},
    }
    num_right = 0
    for a, b in ((481, 7719), (62, 913), (3310, 54), (77, 4021)):
        response = served.openai.responses.create(input=f"Calculate {a} * {b}", **asked)
        runs = [item for item in response.output if item.type == "code_interpreter_call"]
        num_right += any(f"{a} * {b}" in run.code for run in runs) and response.output_text == str(a * b)
    assert num_right >= 2


def test_a_written_policy_gets_a_verdict(served):
    policy = (
        "Judge the message by the policy. Answer in JSON: violation (0 or 1) and the first rule that is broken.\n"
        "R1: gambling\nR2: question"
    )
    for effort in ("low", "medium"):
        response = served.openai.responses.create(
            model="nano",
            instructions=policy,
            input="I have a new dice.",
            temperature=0,
            reasoning={"effort": effort},
        )
        assert list(json.loads(response.output_text)) == ["violation", "rule"]
