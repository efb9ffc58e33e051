"""Adapters that are not merged: each token of a batch goes through its own, as in PEFT's model of that adapter."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from tests.model.conftest import one_sequence
from tests.model.peft_adapters import CASES, save, trained

from ossia.model.adapted import adapt, held_bytes, hold_adapter
from ossia.model.adapter import read_adapter
from ossia.model.transformer import forward
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import Batch, load
from ossia.ops.cpu import Lora

IDS = np.random.default_rng(0).integers(0, 300, 40).tolist()
BACKENDS = {"reference": {}, "cpu": {"dense": "bf16", "threads": 2}}


def joined(sequences: list[list[int]]) -> Batch:
    """Several whole sequences without a cache, logits of every token."""
    each = [one_sequence(ids) for ids in sequences]
    starts = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    return replace(
        each[0],
        token_ids_T=np.concatenate([one.token_ids_T for one in each]),
        positions_T=np.concatenate([one.positions_T for one in each]),
        query_starts_N1=starts,
        key_lengths_N=np.diff(starts),
        full_table_NB=np.zeros((len(each), 0), np.int32),
        window_table_NB=np.zeros((len(each), 0), np.int32),
        logit_rows_R=np.arange(starts[-1], dtype=np.int32),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case, backend, base, tmp_path, hugging_face_logits, assert_same_logits):
    make, folder, config = base
    wrapped = trained(make(), **CASES[case])
    save(wrapped, tmp_path / "adapter")
    ops, checkpoint = load(backend, **BACKENDS[backend]), Checkpoint.open(folder)
    held = hold_adapter(ops, read_adapter(tmp_path / "adapter", config))
    batch = replace(one_sequence(IDS), adapters=(held,))
    weights = adapt(load_weights(checkpoint, ops), batch)
    assert_same_logits(forward(ops, config, weights, batch), hugging_face_logits(wrapped, IDS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sequence_of_a_batch_goes_through_its_own_adapter(
    backend, base, tmp_path, hugging_face_logits, assert_same_logits
):
    make, folder, config = base
    ops, checkpoint = load(backend, **BACKENDS[backend]), Checkpoint.open(folder)
    names = ["all", "attention", "experts", "embedding", "unembedding", "router"]
    models = [trained(make(), seed=i, **CASES[name]) for i, name in enumerate(names)]
    for name, model in zip(names, models, strict=True):
        save(model, tmp_path / name)
    held = [hold_adapter(ops, read_adapter(tmp_path / name, config)) for name in names]
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 300, int(n)).tolist() for n in rng.integers(1, 25, 9)]
    # -1: the model alone.
    own = [3, -1, 0, 0, 5, 1, 4, 2, -1]
    batch = replace(joined(sequences), adapters=tuple(held[i] if i >= 0 else None for i in own))
    weights = adapt(load_weights(checkpoint, ops), batch)
    logits_RV = forward(ops, config, weights, batch)
    for n, (ids, index) in enumerate(zip(sequences, own, strict=True)):
        got = logits_RV[batch.query_starts_N1[n] : batch.query_starts_N1[n + 1]]
        assert_same_logits(got, hugging_face_logits(models[index] if index >= 0 else make(), ids))


def test_only_what_an_adapter_changes_is_replaced(base, tmp_path):
    make, folder, config = base
    save(trained(make(), **CASES["some layers"]), tmp_path / "adapter")
    ops = load("reference")
    held = hold_adapter(ops, read_adapter(tmp_path / "adapter", config))
    weights = load_weights(Checkpoint.open(folder), ops)
    adapted = adapt(weights, replace(one_sequence(IDS), adapters=(held,)))
    assert adapted.layers[0] == weights.layers[0] and adapted.unembedding is weights.unembedding
    assert adapted.layers[1].q.weights is weights.layers[1].q and adapted.layers[1].router is weights.layers[1].router


def test_a_batch_without_adapters_takes_the_weights_as_they_are(base):
    _, folder, _ = base
    weights = load_weights(Checkpoint.open(folder), load("reference"))
    assert adapt(weights, one_sequence(IDS)) is weights


def test_the_size_of_an_adapter_is_that_of_its_numbers(base, tmp_path):
    make, _, config = base
    save(trained(make(), **CASES["all"]), tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", config)
    held = hold_adapter(load("cpu"), adapter)
    assert held.size_bytes == 4 * adapter.num_parameters
    kept = {id(array): array.nbytes for lora in held.loras.values() for array in arrays_of(lora)}
    # The kernels' order pads rows to a multiple of 32.
    assert held.size_bytes <= sum(kept.values()) <= 1.2 * held.size_bytes
    narrow = {key: pair._replace(a=to_bf16(pair.a), b=to_bf16(pair.b)) for key, pair in adapter.pairs.items()}
    assert held_bytes(replace(adapter, pairs=narrow)) > 2 * adapter.num_parameters
    shared = {id(pair.a): to_bf16(pair.a) for pair in adapter.pairs.values()}
    narrow = {key: pair._replace(a=shared[id(adapter.pairs[key].a)]) for key, pair in narrow.items()}
    assert held_bytes(replace(adapter, pairs=narrow)) == 2 * adapter.num_parameters


def arrays_of(lora):
    if isinstance(lora, Lora):
        return [lora.a, lora.b_pieces]
    return [array for one in lora.loras if one is not None for array in arrays_of(one)]


def to_bf16(array):
    return array.astype(ml_dtypes.bfloat16)


def test_a_held_adapter_does_not_need_its_files(base, tmp_path, hugging_face_logits, assert_same_logits):
    make, folder, config = base
    wrapped = trained(make(), **CASES["all"])
    save(wrapped, tmp_path / "adapter")
    ops = load("cpu", dense="bf16")
    held = hold_adapter(ops, read_adapter(tmp_path / "adapter", config))
    path = tmp_path / "adapter/adapter_model.safetensors"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    batch = replace(one_sequence(IDS), adapters=(held,))
    weights = adapt(load_weights(Checkpoint.open(folder), ops), batch)
    assert_same_logits(forward(ops, config, weights, batch), hugging_face_logits(wrapped, IDS))
