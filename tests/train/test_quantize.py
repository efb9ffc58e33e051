"""Training under MXFP4 sees the very numbers that an export writes, and learns straight through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.model.conftest import one_sequence
from tests.ops.test_cpu import ISAS

from ossia import _kernels
from ossia.errors import InputError
from ossia.model import transformer
from ossia.model.adapter import read_adapter, write_adapter
from ossia.model.config import ModelConfig
from ossia.model.random_checkpoint import write_random_checkpoint
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import Mxfp4
from ossia.ops.mxfp4 import BLOCK, dequantize, pack_codes, quantize
from ossia.ops.reference import ReferenceOps
from ossia.train import quantize as train_quantize
from ossia.train.export import export
from ossia.train.lora import LoraConfig, to_adapter
from ossia.train.merged import Merged
from ossia.train.module import Model
from ossia.train.quantize import fake_quantize, rounded_by_torch

SMALL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    num_experts=8,
    sliding_window=8,
    stop_token_ids=(2,),
    pad_token_id=1,
)

KINDS = ["normal", "heavy", "tiny", "huge", "coarse", "zeros", "subnormal", "one large"]


def numbers(kind: str) -> np.ndarray:
    random = np.random.default_rng(0)
    shape = (3, 40, 96)
    return {
        "normal": lambda: random.standard_normal(shape) * 0.02,
        "heavy": lambda: random.standard_t(2, shape),
        "tiny": lambda: random.standard_normal(shape) * 1e-37,
        "huge": lambda: random.standard_normal(shape) * 5e37,
        "coarse": lambda: random.integers(-16, 17, shape) / 8,
        "zeros": lambda: np.zeros(shape) * np.where(random.integers(0, 2, shape), 1.0, -1.0),
        "subnormal": lambda: random.standard_normal(shape) * 1e-40,
        "one large": lambda: np.where(np.arange(96) % 32 == 0, random.uniform(4, 5, shape), 0.25),
    }[kind]().astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["floor", "best"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_forward_pass_sees_exactly_what_an_export_writes(dtype, rule, kind):
    weight = torch.from_numpy(numbers(kind)).to(dtype)
    got = fake_quantize(weight, rule)
    wide = weight.to(torch.float64 if dtype == torch.float64 else torch.float32).numpy()
    want = dequantize(quantize(wide, rule), wide.dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.to(torch.from_numpy(want).dtype).numpy(), want)
    np.testing.assert_array_equal(np.signbit(got.double().numpy()), np.signbit(want))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_the_kernel_of_every_instruction_set_reaches_the_bits_of_torch(isa, kind):
    x = numbers(kind)
    out = np.empty_like(x)
    _kernels.Context(isa, 2).round_mxfp4(x.reshape(-1), out.reshape(-1))
    want = rounded_by_torch(torch.from_numpy(x).view(-1, BLOCK)).numpy().reshape(x.shape)
    np.testing.assert_array_equal(out.view(np.uint32), want.view(np.uint32))


def test_a_strided_matrix_is_rounded_as_its_copy():
    weight = torch.from_numpy(numbers("heavy"))[:, ::2]
    assert not weight.is_contiguous() and torch.equal(fake_quantize(weight), fake_quantize(weight.contiguous()))


def test_both_rules_are_exercised_by_those_numbers():
    assert any(
        (quantize(numbers(kind), "floor").scales != quantize(numbers(kind), "best").scales).any() for kind in KINDS
    )
    assert (quantize(numbers("one large"), "best").scales < quantize(numbers("one large"), "floor").scales).any()
    assert (quantize(numbers("normal"), "best").scales > quantize(numbers("normal"), "floor").scales).any()


def test_the_gradient_passes_straight_through():
    weight = torch.from_numpy(numbers("normal")).requires_grad_()
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    fake_quantize(weight).backward(gradient)
    assert torch.equal(weight.grad, gradient)


def test_a_weight_that_cannot_be_written_exactly_still_learns_towards_its_target():
    # No step of the grid is as small as one of these updates, and yet they add up.
    weight = torch.full((1, 32), 0.1, requires_grad=True)
    target = torch.linspace(-1, 1, 32)
    optimizer = torch.optim.SGD([weight], lr=0.005)
    losses = []
    for _ in range(400):
        optimizer.zero_grad()
        loss = ((fake_quantize(weight) - target) ** 2).sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 10 and losses[-1] < 0.3, "as near as the grid allows"


def test_what_is_on_the_grid_stays_what_it_is():
    random = np.random.default_rng(0)
    matrix = Mxfp4(
        pack_codes(random.integers(0, 16, (4, 3, 32)).astype(np.uint8)), random.integers(1, 252, (4, 3), np.uint8)
    )
    weight = torch.from_numpy(dequantize(matrix))
    assert torch.equal(fake_quantize(weight), weight)


def test_pieces_of_a_large_matrix_are_rounded_as_the_whole(monkeypatch):
    weight = torch.from_numpy(numbers("heavy")).double()
    whole = fake_quantize(weight)
    monkeypatch.setattr(train_quantize, "_CHUNK_VALUES", 64)
    assert torch.equal(fake_quantize(weight), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_block_that_is_not_finite_becomes_nan_as_in_numpy(bad):
    weight = torch.ones(1, 64)
    weight[0, 3] = bad
    got = fake_quantize(weight)
    assert got[0, :32].isnan().all() and torch.equal(got[0, 32:], weight[0, 32:])


def test_a_row_that_is_no_multiple_of_the_block_is_refused_with_its_shape():
    with pytest.raises(InputError, match=r"multiple of 32.*\(2, 33\)"):
        fake_quantize(torch.zeros(2, 33))


# With the model


def test_training_under_mxfp4_computes_what_the_exported_model_computes(tmp_path):
    base = write_random_checkpoint(tmp_path / "base", SMALL, layout="hf-bf16")
    model = Model.open(base, trainable="full", fake_quant=True, checkpoint_activations=False)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, tensor in model.state().items():
            step = torch.randn(tensor.shape, generator=generator) * 0.1
            # What is not rounded to MXFP4 is rounded to bfloat16 by the export: begin from such numbers.
            tensor.add_(step * tensor.std().clamp(min=0.1))
            if (".experts.gate_up" not in name and ".experts.down" not in name) or "bias" in name:
                tensor.copy_(tensor.bfloat16().float())
        want = model(one_sequence(range(100, 140))).numpy()
        plain = Model.open(base, trainable="full", checkpoint_activations=False)
        for name, tensor in plain.state().items():
            tensor.copy_(model.state()[name])
        unrounded = plain(one_sequence(range(100, 140))).numpy()
    trained = tmp_path / "trainable.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in model.state().items()}, trained)
    export(base, tmp_path / "out", "mxfp4", weights=trained, measure=False)
    checkpoint, ops = Checkpoint.open(tmp_path / "out"), ReferenceOps()
    got = transformer.forward(ops, checkpoint.config, load_weights(checkpoint, ops), one_sequence(range(100, 140)))
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    assert np.abs(got - unrounded).max() > 0.01 * np.abs(want).max(), "rounding is seen in training"
    layer = checkpoint.layer(1).experts
    for key, exported in (("gate", layer.gate), ("up", layer.up)):
        rows = slice(0, 96) if key == "gate" else slice(96, None)
        weights = model.state()["layers.1.experts.gate_up"].detach()[:, rows]
        np.testing.assert_array_equal(fake_quantize(weights).numpy(), dequantize(exported))


@pytest.mark.parametrize("targets", [("q", "k", "v", "o"), ("experts",), ("router", "embedding", "unembedding")])
def test_a_trained_adapter_and_its_merged_export_compute_the_same(targets, tmp_path):
    base = write_random_checkpoint(tmp_path / "base", SMALL)
    model = Model.open(base, lora=LoraConfig(rank=4, targets=targets), checkpoint_activations=False)
    batch = one_sequence(range(100, 140))
    optimizer = torch.optim.Adam(model.state().values(), lr=0.02)
    with torch.no_grad():
        before = model(batch).numpy()
    for _ in range(3):
        optimizer.zero_grad()
        (-model.logprobs(batch, np.arange(101, 141))).mean().backward()
        optimizer.step()
    with torch.no_grad():
        want = model(batch).numpy()
    assert np.abs(want - before).max() > 0.05 * np.abs(want).max()
    config = Checkpoint.open(base).config
    adapter = to_adapter(model.weights, LoraConfig(rank=4, targets=targets), "trained")
    folder = write_adapter(tmp_path / "adapter", adapter, config)
    merged, ops = Merged(Checkpoint.open(base), read_adapter(folder, config)), ReferenceOps()
    got = transformer.forward(ops, config, load_weights(merged, ops), batch)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()
    # What the files hold is rounded, and still much nearer to what was trained than to the base.
    export(base, tmp_path / "out", "bf16", adapter=folder, measure=False)
    exported = Checkpoint.open(tmp_path / "out")
    got = transformer.forward(ops, config, load_weights(exported, ops), batch)
    assert np.median(np.abs(got - want)) < 0.1 * np.median(np.abs(before - want))


@pytest.mark.parametrize("layout", ["hf", "hf-bf16"])
def test_pairs_trained_under_rounding_lose_nothing_in_the_merge_and_others_do(layout, tmp_path):
    base = write_random_checkpoint(tmp_path / "base", SMALL, layout=layout)
    batch, targets = one_sequence(range(100, 120)), np.arange(101, 121)
    config = LoraConfig(rank=4, expert_rank=4, alpha=8, targets=("experts",))

    def loss(model: Model) -> float:
        with torch.no_grad():
            return -float(model.logprobs(batch, targets).mean())

    lost = {}
    for fake_quant in (False, True):
        model = Model.open(base, lora=config, fake_quant=fake_quant)
        before = loss(model)
        optimizer = torch.optim.Adam(model.state().values(), lr=2e-3)
        for _ in range(8):
            optimizer.zero_grad()
            (-model.logprobs(batch, targets)).mean().backward()
            optimizer.step()
        trained = loss(model)
        assert trained < before - 0.3
        adapter = write_adapter(
            tmp_path / f"adapter-{fake_quant}", to_adapter(model.weights, config, "trained"), model.config
        )
        export(base, tmp_path / f"out-{fake_quant}", "mxfp4", adapter=adapter, measure=False)
        lost[fake_quant] = loss(Model.open(tmp_path / f"out-{fake_quant}")) - trained
    assert abs(lost[True]) < 1e-5
    assert lost[False] > 0.1
