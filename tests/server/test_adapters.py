"""Adapters behind every API: chosen by name, loaded and unloaded while the server runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from tests.server.conftest import Served
from tests.server.test_model import ADD, SCHEMA

from ossia.config import Config
from ossia.engine import AsyncEngine
from ossia.engine.masks import GrammarCompiler
from ossia.errors import InputError
from ossia.local import LocalModel
from ossia.model.adapter import write_adapter
from ossia.model.random_checkpoint import random_adapter, write_random_checkpoint
from ossia.responses.constrain import Grammars
from ossia.responses.loop import Model
from ossia.server.adapters import Adapters
from ossia.server.store import Store

SAMPLING = {"seed": 7, "temperature": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_shelf(tmp_path_factory.mktemp("adapters"))


def write_shelf(root: Path) -> Path:
    """A model, and a folder of adapters: polite, terse, late, a damaged one, and one that lies outside."""
    model = write_random_checkpoint(root / "tiny", "tiny")
    config = LocalModel.open(Config(model=str(model), backend="reference")).checkpoint.config
    for seed, name in enumerate(("polite", "terse", "late")):
        adapter = random_adapter(config, rank=4, expert_rank=2, outer=name == "late", name=name, seed=seed)
        stronger = {key: pair._replace(scaling=8.0) for key, pair in adapter.pairs.items()}
        write_adapter(root / "shelf" / name, adapter.__class__(name, 4, 4, stronger), config)
    write_adapter(root / "outside", random_adapter(config, rank=2), config)
    (root / "shelf/link").symlink_to(root / "outside")
    write_adapter(root / "shelf/damaged", random_adapter(config, rank=2), config)
    (root / "shelf/damaged/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    return root


def of_shelf(folder: Path) -> dict[str, Path]:
    return {name: folder / "shelf" / name for name in ("polite", "terse")}


def serve(
    path: Path, offered: Mapping[str, Path], shelf: Path | None = None, max_context: int = 0, **fields: Any
) -> tuple[Served, AsyncEngine]:
    """A checkpoint with adapters by name; ``fields`` are those of `Model`."""
    local = LocalModel.open(Config(model=str(path), max_context=max_context))
    engine = AsyncEngine(local.engine)
    constrain = Grammars(GrammarCompiler(local.tokenizer))
    made = Model("tiny", engine, local.tokenizer, constrain=constrain, **fields)
    adapters = Adapters(engine, local.read_adapter, taken=("tiny", "openai/gpt-oss-20b"), folder=shelf)
    for name, folder in offered.items():
        adapters.load(name, folder, made)
    served = Served(made, Store("sqlite://"), adapters=adapters)
    served.service.watch(engine.stats)
    return served, engine


@pytest.fixture(scope="module")
def real(folder):
    served, engine = serve(folder / "tiny", of_shelf(folder), folder / "shelf")
    yield served
    served.stop()
    engine.close()


def post(real: Served, path: str, **body):
    return real.http.post(path, json=body, timeout=60)


def complete(real: Served, model: str | None, prompt: str = "Hello there, who") -> str:
    body = {"prompt": prompt, "max_tokens": 8, **SAMPLING} | ({"model": model} if model else {})
    answer = post(real, "/v1/completions", **body).json()
    assert answer["model"] == (model or "tiny")
    return answer["choices"][0]["text"]


def test_the_list_of_models_shows_adapters_with_their_model(real):
    models = {one["id"]: one for one in real.http.get("/v1/models").json()["data"]}
    assert {"tiny", "polite", "terse"} <= models.keys()
    assert models["polite"]["parent"] == "tiny" and models["polite"]["created"] > 0
    assert "parent" not in models["tiny"]
    assert real.http.get("/v1/models/terse").json()["id"] == "terse"
    assert real.openai.models.retrieve("polite").id == "polite"
    assert "polite" in [one["name"] for one in real.http.get("/api/tags").json()["models"]]
    assert post(real, "/api/show", model="terse").status_code == 200


def test_the_model_of_a_request_chooses_the_adapter_in_every_api(real):
    texts = {name: complete(real, name) for name in (None, "tiny", "polite", "terse")}
    assert texts[None] == texts["tiny"] and len(set(texts.values())) == 3

    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, **SAMPLING}
    said = {}
    for name in ("tiny", "polite"):
        answer = post(real, "/v1/chat/completions", model=name, **chat).json()
        assert answer["model"] == name
        chunks = real.openai.chat.completions.create(model=name, stream=True, **chat)
        seen = [chunk for chunk in chunks if chunk.choices]
        assert {chunk.model for chunk in seen} == {name}
        message = answer["choices"][0]["message"]
        said[name] = message.get("reasoning") or message["content"]
        deltas = [chunk.choices[0].delta for chunk in seen]
        streamed = "".join(getattr(one, "reasoning", None) or one.content or "" for one in deltas)
        assert streamed == said[name]
    assert said["tiny"] != said["polite"]

    for name in ("tiny", "polite"):
        answer = post(real, "/v1/responses", model=name, input="Hi", max_output_tokens=8, temperature=0).json()
        assert answer["model"] == name
        events = real.openai.responses.create(model=name, input="Hi", max_output_tokens=8, temperature=0, stream=True)
        last = list(events)[-1].response
        assert last.model == name
        said[name] = last.output[0].content[0].text if last.output and last.output[0].content else last.output

    claude = {"max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
    of_base, of_adapter, of_other = (
        post(real, "/v1/messages", model=name, **claude).json() for name in ("tiny", "polite", "claude-whatever")
    )
    assert (of_adapter["model"], of_other["model"]) == ("polite", "claude-whatever")
    # A signature is another one every time.
    told = [[block | {"signature": ""} for block in one["content"]] for one in (of_base, of_other, of_adapter)]
    assert told[0] == told[1] != told[2]
    counted = post(real, "/v1/messages/count_tokens", model="polite", messages=claude["messages"]).json()
    assert counted["input_tokens"] > 0


def test_an_unknown_model_is_refused_with_those_that_are_there(real):
    answer = post(real, "/v1/responses", model="rude", input="Hi")
    assert answer.status_code == 404
    assert "this server has 'tiny'" in answer.json()["error"]["message"]
    assert "'polite', 'terse'" in answer.json()["error"]["message"]


def test_tools_and_answers_of_a_form_hold_through_an_adapter(real):
    fields = {"reasoning": {"max_tokens": 4}, "max_output_tokens": 60, "model": "polite", "input": "Hi"}
    made = post(real, "/v1/responses", tools=[ADD], tool_choice="required", **fields).json()
    assert made["model"] == "polite"
    if made["status"] == "completed":
        jsonschema.validate(json.loads(made["output"][-1]["arguments"]), SCHEMA)
        output = {"type": "function_call_output", "call_id": made["output"][-1]["call_id"], "output": "4"}
        after = post(
            real, "/v1/responses", tools=[ADD], previous_response_id=made["id"], input=[output], model="polite",
            max_output_tokens=5,
        ).json()  # fmt: skip
        assert after["usage"]["input_tokens_details"]["cached_tokens"] >= made["usage"]["total_tokens"] - 33
    shape = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    formed = post(real, "/v1/responses", text=shape, **fields).json()
    texts = [i["content"][0]["text"] for i in formed["output"] if i["type"] == "message"]
    if formed["status"] == "completed":
        jsonschema.validate(json.loads(texts[-1]), SCHEMA)


def test_requests_of_many_adapters_at_once_get_what_each_gets_alone(real):
    names = ["tiny", "polite", "terse"]
    alone = {name: complete(real, name) for name in names}
    got: list[tuple[str, str]] = []

    def ask(name: str) -> None:
        got.append((name, complete(real, name)))

    threads = [threading.Thread(target=ask, args=(name,)) for name in names * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 12 and all(text == alone[name] for name, text in got)


def test_an_adapter_is_loaded_and_unloaded_while_the_server_runs(real):
    before = real.http.get("/metrics").text
    assert "ossia_adapters 2.0" in before
    loaded = post(real, "/v1/load_lora_adapter", lora_name="late", lora_path="late")
    assert loaded.status_code == 200 and loaded.json()["id"] == "late" and loaded.json()["parent"] == "tiny"
    assert complete(real, "late") not in (complete(real, "tiny"), complete(real, "polite"))
    again = post(real, "/v1/load_lora_adapter", lora_name="late", lora_path="late")
    assert again.status_code == 400 and "load_inplace" in again.json()["error"]["message"]
    assert "ossia_adapters 3.0" in real.http.get("/metrics").text

    first = complete(real, "late")
    path = str(Path(real.service.adapters.folder) / "terse")
    replaced = post(real, "/v1/load_lora_adapter", lora_name="late", lora_path=path, load_inplace=True)
    assert replaced.status_code == 200
    assert complete(real, "late") == complete(real, "terse") != first

    unloaded = post(real, "/v1/unload_lora_adapter", lora_name="late")
    assert unloaded.json() == {"id": "late", "object": "model", "deleted": True}
    assert post(real, "/v1/completions", model="late", prompt="Hi").status_code == 404
    gone = post(real, "/v1/unload_lora_adapter", lora_name="late")
    assert gone.status_code == 404 and "loaded are: polite, terse" in gone.json()["error"]["message"]
    assert real.http.get("/metrics").text.count("ossia_adapters 2.0") == 1


def test_an_answer_whose_adapter_is_unloaded_comes_to_its_end(real):
    post(real, "/v1/load_lora_adapter", lora_name="brief", lora_path="polite").raise_for_status()
    body = {"model": "brief", "prompt": "Hello there, who", "max_tokens": 60, "ignore_eos": True, **SAMPLING}
    whole = post(real, "/v1/completions", **body).json()["choices"][0]["text"]
    client = openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0)
    fields = {key: value for key, value in body.items() if key != "ignore_eos"}
    stream = client.completions.create(**fields, extra_body={"ignore_eos": True}, stream=True)
    parts = [next(stream).choices[0].text]
    post(real, "/v1/unload_lora_adapter", lora_name="brief").raise_for_status()
    parts += [chunk.choices[0].text for chunk in stream]
    assert "".join(parts) == whole


@pytest.mark.parametrize(
    ("name", "path", "status", "words"),
    [
        ("x", "../outside", 400, "within the server's adapter folder"),
        ("x", "/etc", 400, "within the server's adapter folder"),
        ("x", "link", 400, "within the server's adapter folder"),
        ("x", ".", 400, "within the server's adapter folder"),
        ("x", "polite/../..", 400, "within the server's adapter folder"),
        ("x", "\u0000", 400, "within the server's adapter folder"),
        ("x", "a" * 3000, 400, "within the server's adapter folder"),
        ("x", "nowhere", 404, "there is no folder 'nowhere'"),
        ("x", "damaged", 400, "does not run DoRA"),
        ("tiny", "polite", 400, "'tiny' is a name of the model itself"),
        ("no name", "polite", 400, "lora_name"),
        ("polite", "polite", 400, "is loaded already"),
    ],
)
def test_what_cannot_be_loaded_is_refused(real, name, path, status, words):
    refused = post(real, "/v1/load_lora_adapter", lora_name=name, lora_path=path)
    assert refused.status_code == status and words in refused.json()["error"]["message"]
    assert complete(real, "polite")


def test_without_a_folder_nothing_is_loaded_or_unloaded(folder):
    served, engine = serve(folder / "tiny", of_shelf(folder))
    try:
        for path, body in (
            ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "polite"}),
            ("/v1/unload_lora_adapter", {"lora_name": "polite"}),
        ):
            refused = post(served, path, **body)
            assert refused.status_code == 404 and "--adapter-dir" in refused.json()["error"]["message"]
        assert "polite" in [one["id"] for one in served.http.get("/v1/models").json()["data"]]
        with pytest.raises(InputError, match="is a name of the model itself"):
            served.service.adapters.load("tiny", folder / "shelf/polite", served.service.model)
    finally:
        served.stop()
        engine.close()
