"""Pairs: where they go, how they begin, and that they come back from an adapter's folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ossia.errors import InputError
from ossia.model.adapter import Adapter, LoraPair, read_adapter, write_adapter
from ossia.train.lora import TARGETS, LoraConfig, add_pairs, pairs_off, places, set_adapter, to_adapter
from ossia.train.module import Model

EVERYTHING = LoraConfig(rank=4, targets=TARGETS, expert_rank=2)


def disturbed(model: Model) -> Model:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.state().items():
            if name.endswith(".b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_adapts_its_own_matrices_and_changes_the_model(target, small_model, documents):
    batch = documents(30)
    model = Model.open(small_model(), lora=LoraConfig(rank=2, targets=(target,)))
    matched = {name.rpartition(".")[0] for name in model.state()}
    per_layer = {"experts": ["experts.gate_up", "experts.down"]}.get(target, [target])
    outer = target in ("embedding", "unembedding")
    assert matched == ({target} if outer else {f"layers.{i}.{part}" for i in range(3) for part in per_layer})
    with torch.no_grad():
        before = model(batch)
        assert not torch.equal(disturbed(model)(batch), before)
        with pairs_off(model.weights):
            assert torch.equal(model(batch), before)
        assert not torch.equal(model(batch), before)


def test_training_begins_at_the_model_as_it_is_and_the_same_seed_at_the_same_pairs(small_model, documents):
    batch = documents(20)
    with torch.no_grad():
        plain = Model.open(small_model(), lora=LoraConfig(targets=("q",)))(batch)
        one, two, three = (Model.open(small_model(), lora=EVERYTHING, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one(batch), plain)
    for name, parameter in one.state().items():
        assert torch.equal(parameter, two.state()[name])
        assert name.endswith(".b") or not torch.equal(parameter, three.state()[name])


def test_every_pair_gets_a_gradient_once_it_has_moved(small_model, documents):
    model = disturbed(Model.open(small_model(), lora=EVERYTHING))
    model.logprobs(documents(200), np.arange(200)).sum().backward()
    for name, parameter in model.state().items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_pairs_may_stand_in_some_layers_alone(small_model):
    model = Model.open(small_model(), lora=LoraConfig(targets=("q",), layers=(0, 2)))
    assert list(model.state()) == ["layers.0.q.a", "layers.0.q.b", "layers.2.q.a", "layers.2.q.b"]


def test_a_target_or_layer_that_matches_nothing_is_an_error(small_model):
    for options, words in (
        ({"targets": ("q", "q_proj")}, "'q_proj' matches nothing; expected some of: q, k, v, o, experts"),
        ({"targets": ()}, "targets is empty"),
        ({"rank": 0}, "expected at least 1"),
        ({"expert_rank": 0}, "expected at least 1"),
        ({"alpha": 0.0}, "expected a number above 0"),
        ({"dropout": 1.0}, "expected 0 up to below 1"),
    ):
        with pytest.raises(InputError, match=words):
            LoraConfig(**options)
    model = Model.open(small_model())
    with pytest.raises(InputError, match=r"layers names \[3\]; expected numbers from 0 to 2"):
        add_pairs(model.weights, LoraConfig(layers=(0, 3)), 2)
    with pytest.raises(InputError, match="target q matches no matrix"):
        add_pairs(model.weights, LoraConfig(targets=("q",), layers=()), 2)


def test_experts_get_a_share_of_the_rank_unless_told(small_model):
    assert [LoraConfig(rank=rank).rank_of_experts(4) for rank in (1, 8, 16)] == [1, 2, 4]
    assert LoraConfig(rank=8, expert_rank=3).rank_of_experts(4) == 3
    model = Model.open(small_model(), lora=LoraConfig(rank=8, alpha=16))
    scalings = {place.target: place.lora.scaling for place in places(model.weights) if place.lora is not None}
    assert scalings == {"q": 2, "k": 2, "v": 2, "o": 2, "experts": 4}


def test_an_adapter_written_and_read_back_gives_the_same_bits(small_model, documents, tmp_path):
    model = disturbed(Model.open(small_model(), lora=EVERYTHING))
    batch = documents(30)
    write_adapter(tmp_path / "adapter", to_adapter(model.weights, EVERYTHING, "one"), model.config)
    other = Model.open(small_model(), lora=LoraConfig(targets=("q",)))
    set_adapter(other.weights, read_adapter(tmp_path / "adapter", model.config))
    assert other.state().keys() == model.state().keys()
    for name, parameter in other.state().items():
        assert torch.equal(parameter, model.state()[name]), name
    with torch.no_grad():
        torch.testing.assert_close(other(batch), model(batch))


def test_gate_and_up_with_inputs_of_their_own_are_joined(small_model, documents):
    rng = np.random.default_rng(0)

    def pair(rank: int, scaling: float) -> LoraPair:
        a, b = rng.standard_normal((8, rank, 64)), rng.standard_normal((8, 64, rank))
        return LoraPair(a.astype(np.float32), b.astype(np.float32), scaling)

    gate, up = pair(1, 0.5), pair(2, 0.25)
    batch = documents(30)
    for pairs in ({"gate": gate, "up": up}, {"gate": gate}, {"up": up}):
        model = Model.open(small_model(), lora=LoraConfig(targets=("q",)), dtype=torch.float64)
        adapter = Adapter("one", 1, 1.0, {f"layers.1.experts.{name}": one for name, one in pairs.items()})
        set_adapter(model.weights, adapter)
        met = model(batch)
        merged = Model.open(small_model(), trainable="full", dtype=torch.float64)
        with torch.no_grad():
            halves = merged.weights.layers[1].experts.gate_up_EFD.chunk(2, dim=1)
            for half, name in zip(halves, ("gate", "up"), strict=True):
                if name in pairs:
                    half += torch.from_numpy(pairs[name].scaling * (pairs[name].b @ pairs[name].a).astype(np.float64))
            torch.testing.assert_close(met, merged(batch), atol=1e-5, rtol=0)


def test_an_adapter_for_another_model_is_refused(small_model):
    model = Model.open(small_model())
    pair = LoraPair(np.zeros((1, 64), np.float32), np.zeros((128, 1), np.float32), 1.0)
    with pytest.raises(InputError, match=r"match nothing in this model: layers\.7\.q"):
        set_adapter(model.weights, Adapter("one", 1, 1.0, {"layers.7.q": pair}))


def test_a_few_steps_on_packed_experts_learn_a_text_by_heart(small_model, documents):
    model = Model.open(small_model(), lora=LoraConfig(rank=8, targets=("q", "v", "experts", "unembedding")))
    batch = documents(24, rows=np.arange(23))
    targets = batch.token_ids_T[1:].astype(np.int64)
    optimizer = torch.optim.AdamW(model.state().values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = -model.logprobs(batch, targets).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4
    assert losses[-1] < 0.05
