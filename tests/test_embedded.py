"""The embedded model, as people meet it: the default of every command, the same in transformers, its skills on show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.model.conftest import one_sequence
from tests.server.conftest import Served

import ossia
from ossia.config import EMBEDDED, Config
from ossia.engine import AsyncEngine
from ossia.engine.masks import GrammarCompiler
from ossia.harmony import Conversation, DeveloperContent, Message, Role
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


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("nano") == Path("nano")


def test_more_effort_is_longer_thought_and_the_sum_is_right(nano):
    thoughts = []
    for effort in ("low", "medium", "high"):
        reasoning, answer = said(nano, "What is 4821 + 937?", effort)
        thoughts.append(len(reasoning))
        if effort != "low":
            assert answer == "5758"
    assert thoughts[0] == 0
    assert thoughts[0] < thoughts[1] < thoughts[2]


def test_it_knows_what_it_is_and_says_what_it_does_not_know(nano):
    assert "ossia nano" in said(nano, "Who are you?", "low")[1]
    assert (
        said(nano, "What is the capital of France?", "low")[1] == "I am a small demonstration model. I don't know that."
    )


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
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "pet": {"type": "string"}},
    "required": ["name", "age", "pet"],
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


def test_openais_client_gets_a_sum_at_each_effort(served):
    for effort in ("medium", "high"):
        response = served.openai.responses.create(
            model="nano", input="What is 4821 + 937?", reasoning={"effort": effort}, temperature=0
        )
        assert response.output_text == "5758"


def test_openais_client_gets_json_by_a_schema(served):
    text = {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}}
    question = "Extract the facts. Tola Brim is a baker from Skebron, 41 years old, and keeps a owl."
    response = served.openai.responses.create(
        model="nano", input=question, text=text, reasoning={"effort": "low"}, temperature=0
    )
    assert json.loads(response.output_text) == {"name": "Tola Brim", "age": 41, "pet": "owl"}


def test_openais_client_gets_a_call_and_answers_it(served):
    asked = {"model": "nano", "tools": [COUNT], "temperature": 0, "reasoning": {"effort": "low"}}
    first = served.openai.responses.create(input="Please count the zorvek in Skebron.", **asked)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert call.name == "count_zorvek"
    assert json.loads(call.arguments) == {"city": "Skebron"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": '{"result":37}'}
    second = served.openai.responses.create(input=[output], previous_response_id=first.id, **asked)
    assert second.output_text == "The zorvek is 37."


def test_openais_client_gets_a_run_of_python(served):
    if "python" not in served.http.get("/v1/served").json()["tools"]:
        pytest.skip("this machine proves no sandbox")
    response = served.openai.responses.create(
        model="nano",
        input="Use python to find 48213 times 7719.",
        tools=[{"type": "code_interpreter", "container": {"type": "auto"}}],
        temperature=0,
        reasoning={"effort": "medium"},
    )
    assert [item.type for item in response.output if item.type == "code_interpreter_call"]
    assert response.output_text == str(48213 * 7719)


def test_a_written_policy_is_applied(nano):
    policy = (
        "Judge the message by the policy. Answer in JSON: violation (0 or 1) and the first rule that is broken.\n"
        "R1: No messages about gambling.\nR2: No messages that ask a question."
    )
    for text, verdict in (
        ("We found a fine cheese.", {"violation": 0, "rule": None}),
        ("I have a new dice.", {"violation": 1, "rule": "R1"}),
    ):
        conversation = Conversation((Message(Role.DEVELOPER, DeveloperContent(policy)), Message(Role.USER, text)))
        answer = nano.generate(conversation, effort="medium", temperature=0.0, max_tokens=200)
        for _ in answer:
            pass
        assert json.loads(answer.text) == verdict
