"""The model that learns: engine and trainer agree, whatever is trained, packed, replayed or computed again."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from ossia import ops as backends
from ossia.errors import InputError, NotFoundError
from ossia.model import transformer
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import Batch, Routing
from ossia.ops.autograd import Experts
from ossia.train.lora import LoraConfig
from ossia.train.module import Model
from ossia.train.quantize import fake_quantize

EVERYTHING = LoraConfig(
    rank=2, targets=("q", "k", "v", "o", "experts", "router", "embedding", "unembedding"), expert_rank=2
)
LAYOUTS = ["hf", "hf-bf16", "original"]


def engine_logits(path: Any, batch: Batch, backend: str = "reference", **options: Any) -> np.ndarray:
    checkpoint, ops = Checkpoint.open(path), backends.load(backend, **options)
    return transformer.forward(ops, checkpoint.config, load_weights(checkpoint, ops), batch)


def logprobs_of(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1)
    return np.take_along_axis(logits, targets[:, None], 1)[:, 0] - top - np.log(np.exp(logits - top[:, None]).sum(-1))


def disturbed(model: Model, scale: float = 0.3) -> Model:
    """The model with pairs that do something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.state().items():
            if name.endswith(".b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def gradients(model: Model, batch: Batch, targets: np.ndarray, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.logprobs(batch, targets, **options).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.state().items() if parameter.grad is not None}


# Engine and trainer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trainer_and_reference_engine_give_each_token_the_same_probability(layout, small_model, documents):
    path, batch = small_model(layout), documents(50, 3, 20)
    targets = np.random.default_rng(1).integers(0, 300, 73)
    model = Model.open(path, lora=LoraConfig(rank=2))
    expected = logprobs_of(engine_logits(path, batch), targets)
    np.testing.assert_allclose(model.logprobs(batch, targets).detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(logprobs_of(model(batch).detach().numpy(), targets), expected, atol=1e-5)


def test_trainer_and_cpu_engine_agree_exactly_on_float_experts_and_within_a_bound_on_mxfp4(
    small_model, documents, record_property
):
    batch, targets = documents(60, 30), np.random.default_rng(1).integers(0, 300, 90)
    differences = {}
    for layout in ("hf-bf16", "hf"):
        model = Model.open(small_model(layout), lora=LoraConfig(rank=2))
        engine = logprobs_of(engine_logits(small_model(layout), batch, "cpu", threads=1, dense="bf16"), targets)
        recorded = model.recorded_routing(batch)
        met = model.logprobs(batch, targets, recorded).detach().numpy()
        differences[layout] = float(np.abs(met - engine).max())
        record_property(f"largest difference of a log-probability, {layout}", differences[layout])
    assert differences["hf-bf16"] < 1e-5, differences
    # The engine rounds what goes into an MXFP4 product to 8 bits, the trainer does not.
    assert differences["hf"] < 0.05, differences


def test_a_longer_context_than_the_window_keeps_engine_and_trainer_together(small_model, documents):
    path, batch = small_model(), documents(200, 17, 16, 15)
    targets = np.random.default_rng(1).integers(0, 300, 248)
    expected = logprobs_of(engine_logits(path, batch), targets)
    met = Model.open(path, lora=LoraConfig(rank=2)).logprobs(batch, targets).detach().numpy()
    np.testing.assert_allclose(met, expected, atol=1e-5)


# In float32 pairs that do much make products that round differently by the number of their rows.
@pytest.mark.parametrize(("dtype", "scale", "bound"), [(torch.float64, 0.3, 1e-11), (torch.float32, 0.1, 1e-5)])
def test_packed_documents_are_as_if_each_were_alone(small_model, documents, dtype, scale, bound):
    model = disturbed(Model.open(small_model(), dtype=dtype, lora=EVERYTHING), scale)
    together = documents(40, 9, 30)
    targets = np.random.default_rng(2).integers(0, 300, 79)
    met = model.logprobs(together, targets).detach().numpy()
    starts = together.query_starts_N1
    for start, end in pairwise(starts):
        alone = Batch(
            together.token_ids_T[start:end],
            together.positions_T[start:end],
            np.array([0, end - start], np.int32),
            np.array([end - start], np.int32),
            together.full_table_NB[:1],
            together.window_table_NB[:1],
            np.arange(end - start, dtype=np.int32),
        )
        got = model.logprobs(alone, targets[start:end]).detach()
        np.testing.assert_allclose(got, met[start:end], rtol=0, atol=bound)


def test_only_the_rows_that_are_asked_for_are_unembedded(small_model, documents):
    model = Model.open(small_model(), lora=LoraConfig(rank=2))
    whole = model(documents(20))
    some = model(documents(20, rows=[3, 19]))
    torch.testing.assert_close(some, whole[[3, 19]])


def test_temperature_divides_the_logits(small_model, documents):
    model, batch, targets = Model.open(small_model()), documents(12), np.arange(12)
    expected = logprobs_of(model(batch).detach().numpy() / 0.5, targets)
    np.testing.assert_allclose(model.logprobs(batch, targets, temperature=0.5).detach(), expected, atol=1e-5)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_gradients_of_the_whole_model_are_those_of_finite_differences(trainable, small_model, documents):
    lora = EVERYTHING if trainable == "lora" else None
    model = Model.open(small_model(), dtype=torch.float64, trainable=trainable, lora=lora)
    if lora is not None:
        disturbed(model)
    batch, targets = documents(20, 5), np.random.default_rng(1).integers(0, 300, 25)
    routing = model.recorded_routing(batch)
    met = gradients(model, batch, targets, routing=routing)
    # Nobody is left out, but experts that no token goes to.
    assert met.keys() == model.state().keys()
    rng, step = np.random.default_rng(0), 1e-6
    with torch.no_grad():
        for name, parameter in model.state().items():
            direction = torch.from_numpy(rng.standard_normal(parameter.shape))
            sums = []
            for sign in (1, -1):
                parameter += sign * step * direction
                sums.append(model.logprobs(batch, targets, routing).sum().item())
                parameter -= sign * step * direction
            expected = (sums[0] - sums[1]) / (2 * step)
            assert (met[name].double() * direction).sum().item() == pytest.approx(expected, rel=2e-5, abs=1e-5), name


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_computing_activations_again_changes_no_bit(trainable, small_model, documents):
    batch, targets = documents(40, 9), np.random.default_rng(1).integers(0, 300, 49)
    met = []
    for again in (True, False):
        model = Model.open(
            small_model(),
            trainable=trainable,
            lora=EVERYTHING if trainable == "lora" else None,
            checkpoint_activations=again,
        )
        met.append(gradients(disturbed(model) if trainable == "lora" else model, batch, targets))
    assert met[0].keys() == met[1].keys()
    for name, gradient in met[0].items():
        assert torch.equal(gradient, met[1][name]), name


def test_computing_activations_again_drops_the_same_inputs(small_model, documents):
    batch, targets = documents(40), np.arange(40)
    met = []
    for again in (True, False):
        lora = LoraConfig(rank=2, targets=("q", "o"), dropout=0.5)
        model = disturbed(Model.open(small_model(), lora=lora, checkpoint_activations=again)).train()
        torch.manual_seed(7)
        met.append(gradients(model, batch, targets))
    for name, gradient in met[0].items():
        assert torch.equal(gradient, met[1][name]), name


def test_dropout_is_for_training_alone(small_model, documents):
    model = disturbed(Model.open(small_model(), lora=LoraConfig(rank=2, targets=("q",), dropout=0.5)))
    batch = documents(20)
    with torch.no_grad():
        assert torch.equal(model.eval()(batch), model.eval()(batch))
        assert not torch.equal(model.train()(batch), model.train()(batch))


def test_the_same_seed_gives_the_same_bits(small_model, documents):
    batch, targets = documents(40, 9), np.random.default_rng(1).integers(0, 300, 49)
    one, two = (gradients(disturbed(Model.open(small_model(), lora=EVERYTHING)), batch, targets) for _ in range(2))
    for name, gradient in one.items():
        assert torch.equal(gradient, two[name]), name


def test_bfloat16_keeps_norms_softmax_and_router_in_float32_and_stays_close(small_model, documents):
    path, batch = small_model(), documents(60, 9)
    targets = np.random.default_rng(1).integers(0, 300, 69)
    exact, half = (
        disturbed(Model.open(path, dtype=dtype, lora=EVERYTHING), 0.05) for dtype in (torch.float32, torch.bfloat16)
    )
    routing = exact.recorded_routing(batch)
    difference = (exact.logprobs(batch, targets, routing) - half.logprobs(batch, targets, routing)).abs()
    assert half.logprobs(batch, targets).dtype == torch.float32
    assert 0 < difference.max() < 0.15
    seen: list[torch.dtype] = []
    half.ops.on_route = lambda logits_TE, experts_TA: seen.append(logits_TE.dtype)
    half.hidden(batch)
    assert seen == [torch.float32] * 3
    met, expected = gradients(half, batch, targets, routing=routing), gradients(exact, batch, targets, routing=routing)
    for name, gradient in met.items():
        assert gradient.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(gradient.ravel(), expected[name].ravel(), dim=0)
        assert cosine > 0.98, (name, cosine)


# Experts stay packed --------------------------------------------------------------------------------------------------


def test_packed_experts_lie_in_the_file_and_the_rest_of_the_frozen_weights_too(small_model):
    path = small_model()
    model = Model.open(path)
    own = model.unembedding.weight_OI
    assert own.dtype == torch.bfloat16
    with open("/proc/self/maps") as maps:
        ranges = [line.split("-", 1) for line in maps if str(path) in line]
    bounds = [(int(low, 16), int(rest.split(" ", 1)[0], 16)) for low, rest in ranges]
    for layer in model.weights.layers:
        experts: Experts = layer.experts
        assert not list(experts.parameters(recurse=False))
        assert experts.packed_gate_up is not None and experts.packed_down is not None
        for packed in (*experts.packed_gate_up, experts.packed_down):
            assert any(low <= packed.blocks.data_ptr() < high for low, high in bounds)
    assert any(low <= own.data_ptr() < high for low, high in bounds)


def test_training_leaves_every_frozen_byte_as_it_was(small_model, documents):
    path = small_model()
    before = {file: file.read_bytes() for file in path.iterdir()}
    model = disturbed(Model.open(path, lora=EVERYTHING))
    optimizer = torch.optim.AdamW(model.state().values(), lr=0.1)
    model.logprobs(documents(20), np.arange(20)).sum().backward()
    optimizer.step()
    assert {file: file.read_bytes() for file in path.iterdir()} == before


def test_full_training_under_fake_quantisation_computes_with_what_mxfp4_keeps(small_model, documents):
    path, batch, targets = small_model("hf-bf16"), documents(30), np.arange(30)
    plain = Model.open(path, trainable="full")
    quantised = Model.open(path, trainable="full", fake_quant=True)
    for model in (plain, quantised):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for layer in model.weights.layers:
                for matrix in (layer.experts.gate_up_EFD, layer.experts.down_EDF):
                    matrix += 0.02 * torch.randn(matrix.shape, generator=generator)
    routing = plain.recorded_routing(batch)
    met = gradients(quantised, batch, targets, routing=routing)
    assert (quantised.logprobs(batch, targets, routing) - plain.logprobs(batch, targets, routing)).abs().max() > 1e-3
    with torch.no_grad():
        for layer in plain.weights.layers:
            for matrix in (layer.experts.gate_up_EFD, layer.experts.down_EDF):
                matrix.copy_(fake_quantize(matrix))
    expected = gradients(plain, batch, targets, routing=routing)
    torch.testing.assert_close(
        quantised.logprobs(batch, targets, routing), plain.logprobs(batch, targets, routing), atol=1e-5, rtol=0
    )
    for name, gradient in met.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4, msg=name)


# Replay ---------------------------------------------------------------------------------------------------------------


def test_a_recorded_choice_of_experts_that_is_replayed_gives_the_same_bits(small_model, documents):
    model, batch, targets = disturbed(Model.open(small_model(), lora=EVERYTHING)), documents(30, 8), np.arange(38)
    recorded = model.recorded_routing(batch)
    assert [routing.experts_TA.shape for routing in recorded] == [(38, 2)] * 3
    assert torch.equal(model.logprobs(batch, targets, recorded), model.logprobs(batch, targets))
    arrays = [Routing(routing.experts_TA.numpy().astype(np.uint16), None) for routing in recorded]
    assert torch.equal(model.logprobs(batch, targets, arrays), model.logprobs(batch, targets))


def test_a_replayed_choice_is_kept_when_the_router_has_changed_its_mind(small_model, documents):
    model, batch, targets = Model.open(small_model(), lora=EVERYTHING), documents(30), np.arange(30)
    recorded = model.recorded_routing(batch)
    with torch.no_grad():
        model.state()["layers.1.router.b"].normal_(generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model.recorded_routing(batch)[1].experts_TA, recorded[1].experts_TA)
    seen: list[torch.Tensor] = []
    model.ops.on_route = lambda logits_TE, experts_TA: seen.append(experts_TA)
    model.logprobs(batch, targets, recorded).sum().backward()
    for met, routing in zip(seen, recorded, strict=True):
        assert torch.equal(met, routing.experts_TA)
    assert model.state()["layers.1.router.b"].grad.abs().max() > 0


def test_routing_of_another_shape_is_refused(small_model, documents):
    model, batch = Model.open(small_model()), documents(10)
    recorded = model.recorded_routing(batch)
    with pytest.raises(InputError, match="2 layers; the model has 3"):
        model.hidden(batch, recorded[:2])
    with pytest.raises(InputError, match="experts for each of the batch's 9 tokens"):
        model.hidden(documents(9), recorded)


# What is trained ------------------------------------------------------------------------------------------------------


def test_the_table_names_what_is_trained_and_its_share(small_model):
    rows = {
        row.pattern: row
        for row in Model.open(small_model(), lora=LoraConfig(rank=4, targets=("q", "experts"))).trainable_table()
    }
    assert list(rows) == [
        "layers.*.q.a",
        "layers.*.q.b",
        "layers.*.experts.gate_up.a",
        "layers.*.experts.gate_up.b",
        "layers.*.experts.down.a",
        "layers.*.experts.down.b",
    ]
    assert rows["layers.*.q.b"][1:3] == (3, 3 * 128 * 4)
    assert rows["layers.*.experts.gate_up.b"][1:3] == (3, 3 * 8 * 128 * 2)


def test_full_training_trains_every_number(small_model):
    path = small_model()
    checkpoint = Checkpoint.open(path)
    num_numbers = sum(
        int(np.prod(entry.shape)) * (2 if name.endswith("_blocks") else 1)
        for name, entry in checkpoint.tensors.items()
        if not name.endswith("_scales")
    )
    model = Model.open(path, trainable="full")
    rows = model.trainable_table()
    assert sum(row.num_numbers for row in rows) == num_numbers
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.state().values())
    frozen = Model.open(path, lora=LoraConfig(rank=1, targets=("q",)))
    (share,) = {row.num_numbers / row.share for row in frozen.trainable_table()}
    assert share == pytest.approx(num_numbers + sum(row.num_numbers for row in frozen.trainable_table()))


def test_bad_options_are_refused(small_model, tmp_path):
    path = small_model()
    for options, words in (
        ({"trainable": "half"}, "'half'; expected one of: lora, full"),
        ({"dtype": torch.float16}, "torch.float16; expected one of"),
        ({"trainable": "full", "lora": LoraConfig()}, "choose one"),
    ):
        with pytest.raises(InputError, match=words):
            Model.open(path, **options)
    with pytest.raises(NotFoundError):
        Model.open(tmp_path / "nowhere")
