"""A model as a Python program uses it: load, generate, read deltas, leave."""

from __future__ import annotations

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ossia
from ossia.cli.prompts import encode_with_specials
from ossia.errors import CheckpointError, ConfigError, InputError, NotFoundError, OssiaError
from ossia.harmony import DeveloperContent, Message, Role, ToolDescription, ToolNamespace
from ossia.model.adapter import write_adapter
from ossia.model.random_checkpoint import random_adapter, write_random_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("local") / "tiny", "tiny", num_layers=2)


@pytest.fixture(scope="module")
def model(tiny):
    return ossia.load(tiny)


def test_settings_are_checked_and_spelled_as_in_the_settings_file(tiny):
    model = ossia.load(tiny, kv_memory="16MiB", max_context=100)
    assert len(list(model.generate("Hello", seed=1))) > 0
    with pytest.raises(ConfigError, match="kv_memory is 'lots'; expected a size such as 2GiB"):
        ossia.load(tiny, kv_memory="lots")
    with pytest.raises(ConfigError, match="unknown setting 'kvmemory'; did you mean 'kv_memory'"):
        ossia.load(tiny, kvmemory=1)
    with pytest.raises(NotFoundError, match=r"there is no file or folder nan, .*nano, gpt-oss-20b"):
        ossia.load("nan")


# Adapters ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "polite"
    made = random_adapter(model.checkpoint.config, rank=4, expert_rank=2)
    pairs = {key: pair._replace(scaling=8.0) for key, pair in made.pairs.items()}
    return write_adapter(folder, dataclasses.replace(made, pairs=pairs), model.checkpoint.config)


def test_an_answer_may_go_through_an_adapter(tiny, model, adapter):
    def say(model, **fields):
        return [d.text for d in model.generate("Hello", max_tokens=8, seed=1, current_date="2026-01-01", **fields)]

    without = say(model)
    assert model.load_adapter(adapter) == "polite"
    through = say(model, adapter="polite")
    assert through != without and say(model) == without
    assert say(ossia.load(tiny, adapters={"other": adapter}), adapter="other") == through
    model.unload_adapter("polite")
    with pytest.raises(NotFoundError, match="there is no adapter 'polite'"):
        model.generate("Hello", adapter="polite")


def test_an_adapter_beyond_its_memory_is_refused(tiny, adapter):
    with pytest.raises(ConfigError, match=r"adapter 'polite' takes .*; adapter_memory is 0\.0 MiB"):
        ossia.load(tiny, adapter_memory="4096").load_adapter(adapter)


def test_an_adapter_with_another_embedding_than_the_models_is_refused(model, tmp_path):
    config = model.checkpoint.config
    embedding = model.checkpoint.array("model.embed_tokens.weight")
    made = random_adapter(config, rank=2)
    folder = write_adapter(tmp_path / "same", made, config)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file(tensors | {name: embedding.astype(np.float32)}, file)
    assert model.read_adapter(folder).base_copies.keys() == {"embedding"}
    changed = embedding.astype(np.float32)
    changed[150_000, 3] += 1
    save_file(tensors | {name: changed}, file)
    with pytest.raises(CheckpointError, match="another embedding than the model's own"):
        model.read_adapter(folder)


@pytest.fixture(scope="module")
def nano():
    return ossia.load(threads=1)


# Answers -------------------------------------------------------------------------------------------------------------


def test_deltas_join_to_the_texts_of_the_messages(model):
    generation = model.generate("Hello", max_tokens=20, seed=1, current_date="2026-01-01")
    deltas = "".join(delta.text for delta in generation)
    assert deltas == "".join(message.text for message in generation.messages)
    assert generation.finish_reason == "length" and len(generation.token_ids) == 20


def test_answers_read_in_turns_are_those_given_alone(model):
    alone = [[d.text for d in model.generate("Hello", max_tokens=8, seed=seed)] for seed in (1, 2)]
    first, second = (model.generate("Hello", max_tokens=8, seed=seed) for seed in (1, 2))
    texts = ([next(first).text], [next(second).text])
    texts[1].extend(delta.text for delta in second)
    texts[0].extend(delta.text for delta in first)
    assert list(texts) == alone


def test_an_answer_stops_at_a_call_whatever_the_checkpoint_says(model):
    call = model.tokenizer.special("<|call|>")
    # The stops of generation_config.json as first published, which lack <|call|>.
    stops = model.engine._runner.config.stop_token_ids
    old = dataclasses.replace(model.engine._runner.config, stop_token_ids=tuple(i for i in stops if i != call))
    model.engine._runner.config, published = old, model.engine._runner.config
    try:
        generation = model.generate("Hello", max_tokens=5, temperature=0, logit_bias={call: 1000})
        list(generation)
        going_on = model.generate("Hello", max_tokens=5, temperature=0, logit_bias={call: 1000}, ignore_eos=True)
        list(going_on)
    finally:
        model.engine._runner.config = published
    assert generation.token_ids == [call] and generation.finish_reason == "stop"
    assert going_on.token_ids == [call] * 5


def test_the_checkpoint_says_how_to_sample_unless_it_is_said(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "likeliest")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"temperature": 0.0, "top_k": 5}))
    model = ossia.load(folder)

    def say(**sampling):
        generation = model.generate("Hello", max_tokens=8, current_date="2026-01-01", **sampling)
        list(generation)
        return generation.token_ids

    assert say(seed=1) == say(seed=2) == say(temperature=0)
    assert say(seed=1, temperature=1.0) != say(seed=1)


def test_stop_strings_end_the_answer_and_no_thought(nano):
    def ask(**sampling):
        return nano.generate("What is 1234 + 5678?", effort="high", temperature=0, **sampling)

    whole = ask()
    list(whole)
    assert "91" in whole.reasoning and whole.text == "6912"
    stopped = ask(stop_strings=("91",))
    shown = "".join(delta.text for delta in stopped if delta.channel == "final")
    assert (stopped.reasoning, stopped.text, shown, stopped.finish_reason) == (whole.reasoning, "6", "6", "stop")
    assert stopped.messages[-1].channel == "final" and nano._outputs == {}
    # What may begin a stop is shown at the end.
    going_on = ask(stop_strings=("12!", "analysis"))
    assert [d.text for d in going_on if d.channel == "final"][-1] == "12" and going_on.text == "6912"


def test_a_conversation_goes_on_without_the_thoughts_of_answered_turns(nano):
    said: list = []
    for number in range(3):
        said.append({"role": "user", "content": f"1{number}+34?"})
        answer = nano.generate(said, effort="high", temperature=0)
        list(answer)
        assert nano.tokenizer.decode(answer.prompt_token_ids).count("<|channel|>analysis<|message|>") == 0
        said += answer.messages
    told = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]
    prompt = nano.tokenizer.decode(nano.generate(told, max_tokens=1).prompt_token_ids)
    assert "<|start|>assistant<|channel|>final<|message|>Hello<|end|>" in prompt


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["low", "high"]},
        "lines": {"type": "array", "items": {"enum": [1, 20, 300]}, "maxItems": 2},
    },
    "required": ["kind", "lines"],
    "additionalProperties": False,
}


def soon(model):
    """A bias that ends what may end: noise seldom does."""
    return {model.tokenizer.special(name): 1000 for name in ("<|end|>", "<|return|>", "<|call|>")}


def test_noise_itself_answers_in_the_schema(model):
    for seed in range(3):
        answer = model.generate("Report.", output_schema=SCHEMA, seed=seed, logit_bias=soon(model), max_tokens=300)
        read = json.loads(answer.read())
        assert read["kind"] in ("low", "high") and set(read["lines"]) <= {1, 20, 300}
    freely = model.generate("Report.", output_schema=SCHEMA, enforce=False, seed=1, max_tokens=30)
    freely.read()
    assert freely.messages[0].defects and freely.prompt_token_ids == answer.prompt_token_ids


def test_the_form_of_the_answer_is_told_as_the_model_was_trained(model):
    answer = model.generate("Report.", output_schema=SCHEMA, max_tokens=1)
    assert "# Response Formats\n\n## answer\n" in model.tokenizer.decode(answer.prompt_token_ids)


@ossia.tool
def close_barost(loud: bool) -> str:
    """Closes the barost."""
    return "ok"


def test_no_other_tool_is_called_than_those_declared_and_arguments_fit(model):
    seen = set()
    for seed in range(6):
        answer = model.generate("Close.", tools=[close_barost], seed=seed, logit_bias=soon(model), max_tokens=400)
        answer.read()
        last = answer.messages[-1]
        seen.add(last.recipient)
        if last.recipient is not None:
            assert json.loads(last.text)["loud"] in (True, False) and last.content_type == "<|constrain|>json"
        assert answer.finish_reason == "stop" and not any(m.defects for m in answer.messages)
    assert "functions.close_barost" in seen and seen <= {None, "functions.close_barost"}


def test_messages_with_tools_of_their_own_are_enforced_too(model):
    declared = DeveloperContent(tools=(ToolNamespace.functions([close_barost.declaration]),))
    messages = [Message(Role.DEVELOPER, declared), Message(Role.USER, "Close.")]
    own, given = (
        model.generate(*asked, seed=1, max_tokens=20, temperature=1, current_date="2026-01-01", **tools)
        for asked, tools in (((messages,), {}), (("Close.",), {"tools": [close_barost]}))
    )
    assert own.prompt_token_ids == given.prompt_token_ids
    own.read(), given.read()
    assert own.token_ids == given.token_ids


def test_threads_take_turns_with_a_model(nano):
    asked = [f"What is {1000 + 37 * i} + {4000 + 11 * i}?" for i in range(6)]
    alone = [nano.generate(question, temperature=0).read() for question in asked]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda question: nano.generate(question, temperature=0).read(), asked * 2))
    assert together == alone * 2 and nano._outputs == {}


def test_a_stop_string_may_be_a_text_alone(nano):
    assert nano.generate("What is 1234 + 5678?", temperature=0, stop_strings="21").read() == "6912"
    assert nano.generate("What is 1234 + 5678?", temperature=0, stop_strings="12").read() == "69"


def test_two_tools_of_one_name_are_refused(model):
    with pytest.raises(InputError, match=r"two tools are named 'functions\.close_barost'"):
        model.generate("Close.", tools=[close_barost, close_barost])


def test_of_a_tool_that_is_declared_again_the_last_counts(model):
    def declared(kind):
        parameters = {"type": "object", "properties": {"x": {"enum": kind}}, "required": ["x"]}
        tool = ToolDescription("f", "", {**parameters, "additionalProperties": False})
        return Message(Role.DEVELOPER, DeveloperContent(tools=(ToolNamespace.functions([tool]),)))

    messages = [declared(["old"]), Message(Role.USER, "a"), declared(["new"]), Message(Role.USER, "b")]
    for seed in range(6):
        answer = model.generate(messages, seed=seed, logit_bias=soon(model), max_tokens=300)
        answer.read()
        assert answer.messages[-1].recipient is None or json.loads(answer.messages[-1].text) == {"x": "new"}


@pytest.mark.parametrize(
    ("given", "settings", "match"),
    [
        (None, {}, "messages is None"),
        ("Hi", {"max_tokens": "10"}, "sampling parameters cannot be used"),
        ("Hi", {"tools": ToolDescription("f")}, "tools is ToolDescription"),
        ("Hi", {"logprobs": True}, "unknown parameter 'logprobs'"),
        (
            "Hi",
            {"output_schema": {"type": "object"}, "min_tokens": 3},
            "min_tokens is 3; it must be 0 beside a grammar",
        ),
    ],
)
def test_what_is_of_another_kind_is_told(given, settings, match, model):
    with pytest.raises(InputError, match=match):
        model.generate(given, **settings)


def test_tools_whose_schemas_cannot_be_enforced_take_any_object_and_the_others_fit(model):
    late = {"type": "object", "properties": {"a": {"type": "string"}}, "minProperties": 1}
    tools = [close_barost, ToolDescription("update", "", late), ToolDescription("other", "", {"not": {}})]

    def fits(text):
        mask = np.zeros(-(-model.tokenizer.vocab_size // 32), np.uint32)
        made = model.constraint([Message(Role.DEVELOPER, DeveloperContent(tools=(functions(tools),)))])
        for token in encode_with_specials(model.tokenizer, text):
            made.fill(mask)
            if not mask[token // 32] >> np.uint32(token % 32) & 1:
                return False
            made.accept(token)
        return made.is_complete

    call = "<|channel|>commentary to=functions.{} <|constrain|>json<|message|>{}<|call|>"
    assert fits(call.format("update", "{}")) and fits(call.format("other", '{"x":1}'))
    assert fits(call.format("close_barost", '{"loud":true}')) and not fits(call.format("close_barost", "{}"))


def functions(tools):
    return ToolNamespace.functions([getattr(tool, "declaration", tool) for tool in tools])


def test_one_message_is_a_conversation(model):
    one, text = (model.generate(x, max_tokens=1) for x in (Message(Role.USER, "Hi"), "Hi"))
    assert one.prompt_token_ids == text.prompt_token_ids


def test_a_tool_or_schema_that_is_none_is_refused(model):
    with pytest.raises(InputError, match=r"tools\[0\] is <function.*@ossia.tool"):
        model.generate("Hello", tools=[close_barost.function])
    with pytest.raises(InputError, match="expected a JSON Schema") as wrong:
        model.generate("Hello", output_schema="json")
    assert wrong.value.param == "output_schema"
    with pytest.raises(InputError, match="cannot be enforced") as wrong:
        model.generate("Hello", output_schema={"type": "object", "not": {}})
    assert wrong.value.param == "output_schema"
    model.generate("Hello", output_schema={"not": {}}, enforce=False, max_tokens=1).read()
    with pytest.raises(InputError, match="the messages have one"):
        model.generate([Message(Role.DEVELOPER, "Be brief."), Message(Role.USER, "Hi")], output_schema=SCHEMA)


def test_a_date_that_is_none_is_refused(model):
    assert model.generate("Hello", max_tokens=1, current_date="2026-02-28").prompt_token_ids
    for wrong in ("tomorrow", "2026-02-30", ""):
        with pytest.raises(InputError, match="expected YYYY-MM-DD"):
            model.generate("Hello", current_date=wrong)


# Leaving and failing -------------------------------------------------------------------------------------------------


def test_an_answer_that_is_closed_ends_and_frees_its_memory(model):
    with model.generate("Hello", seed=1) as generation:
        next(generation)
    assert generation.finish_reason == "abort" and list(generation) == []
    assert not any(output.finish_reason is None for output in model.engine.step())
    assert model.engine.stats().num_running == 0


def test_a_loop_that_is_broken_off_frees_its_memory_at_the_next_use(model):
    for _ in model.generate("Hello", seed=1):
        break
    list(model.generate("Hello", seed=2, max_tokens=2))
    assert model._outputs == {} and not model.engine.has_work


def test_an_answer_that_is_dropped_in_the_midst_of_a_step_changes_nothing_there(model, monkeypatch):
    """The collector of cycles may run at any allocation."""
    alone = [delta.text for delta in model.generate("Hello", max_tokens=8, seed=2)]
    held = [model.generate("Hello there, my friend", seed=1)]
    next(held[0])
    run = model.engine._runner.run

    def dropping(*args, **kwargs):
        held.clear()
        return run(*args, **kwargs)

    other = model.generate("Hello", max_tokens=8, seed=2)
    monkeypatch.setattr(model.engine._runner, "run", dropping)
    assert [delta.text for delta in other] == alone
    list(model.generate("Hello", max_tokens=1, seed=3))
    assert model._outputs == {} and not model.engine.has_work


class Interrupted(BaseException):
    pass


def test_after_an_interrupted_step_no_answer_waits_for_ever(model, monkeypatch):
    interrupted, other = (model.generate("Hello", max_tokens=8, seed=seed) for seed in (1, 2))
    next(interrupted)
    with monkeypatch.context() as patch:
        patch.setattr(model.engine._runner, "run", lambda batch: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            list(interrupted)
    assert interrupted.finish_reason == "error" and list(interrupted) == []
    with pytest.raises(OssiaError, match="ask again"):
        list(other)
    assert other.finish_reason == "error" and list(other) == []
    assert list(model.generate("Hello", max_tokens=2, seed=1))
