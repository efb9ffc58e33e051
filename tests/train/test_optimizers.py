"""AdamW and Muon: what decays, what they do, and that they are restored exactly."""

from __future__ import annotations

import pytest
import torch

from ossia.errors import CheckpointError
from ossia.train import optimizers
from ossia.train.optimizers import Optimizer, WeightMean, is_inner_matrix, is_matrix, orthogonalize

SHAPES = {
    "layers.0.q.weight": (8, 6),
    "layers.0.q.bias": (8,),
    "layers.0.sinks": (4,),
    "layers.0.attention_norm": (6,),
    "layers.0.router.weight": (3, 6),
    "layers.0.experts.gate": (3, 10, 6),
    "layers.0.experts.gate_bias": (3, 10),
    "unembedding": (12, 6),
}


def _parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in SHAPES.items()}


def _set_gradients(named, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_a_mean_counts_later_steps_by_a_power_and_changes_places_with_the_parameters():
    named = {"w": torch.zeros(2, requires_grad=True)}
    mean = WeightMean(named, power=3.0)
    for step in range(1, 1001):
        with torch.no_grad():
            named["w"].copy_(torch.tensor([float(step), 5.0]))
        mean.add(step)
    with mean.in_place():
        # Of i to the power of 3 the mean of i is 4/5 of the last.
        torch.testing.assert_close(named["w"].detach(), torch.tensor([800.0, 5.0]), rtol=2e-3, atol=0)
    assert named["w"].tolist() == [1000.0, 5.0]
    (key,) = mean.state()
    assert key == "w/mean"
    other = WeightMean(named, power=3.0)
    other.load({"w": mean.state()[key]})
    other.exchange()
    assert named["w"][0].item() == mean.state()[key][0].item()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_matrices_alone_decay(kind):
    named = _parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = Optimizer(named.items(), kind=kind, weight_decay=0.5)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for name, parameter in named.items():
        factor = 0.95 if parameter.ndim >= 2 and "bias" not in name else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)


def test_muon_is_for_inner_matrices_with_the_experts_but_not_for_embeddings_and_routers():
    named = _parameters()
    inner = [name for name, p in named.items() if is_inner_matrix(name, p)]
    assert inner == ["layers.0.q.weight", "layers.0.experts.gate"]
    assert is_matrix("unembedding", named["unembedding"])
    assert set(Optimizer(named.items(), kind="muon").state()) == set()


def test_adamw_moves_as_its_paper_says():
    p = torch.tensor([[1.0, -2.0]], requires_grad=True)
    optimizer = Optimizer([("w", p)], betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.1)
    m = v = torch.zeros(1, 2, dtype=torch.float64)
    expected = p.detach().double()
    for t, g in enumerate(([0.5, -1.0], [0.25, 3.0]), start=1):
        p.grad = torch.tensor([g])
        optimizer.step(0.01)
        g64 = torch.tensor([g], dtype=torch.float64)
        m, v = 0.9 * m + 0.1 * g64, 0.99 * v + 0.01 * g64**2
        expected = expected * (1 - 0.01 * 0.1)
        expected = expected - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 48), (5, 24, 8)], ids=str)
def test_an_orthogonal_update_has_singular_values_around_one(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(orthogonalize(g))
    assert values.max() < 1.21 and values.min() > 0.79
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(orthogonalize(g).flatten(), (u @ vh).flatten(), dim=0) > 0.95


def test_muon_with_torchs_polynomial_agrees_with_torchs_own_on_two_dimensions(monkeypatch):
    monkeypatch.setattr(optimizers, "_NEWTON_SCHULZ", ((3.4445, -4.7750, 2.0315),) * 5)
    ours, theirs = (torch.randn(24, 16, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    optimizer = Optimizer([("w", ours)], kind="muon", weight_decay=0.1, momentum=0.9)
    peer = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for seed in range(4):
        g = torch.randn(24, 16, generator=torch.Generator().manual_seed(10 + seed))
        ours.grad, theirs.grad = g.clone(), g.clone()
        optimizer.step(0.05)
        peer.step()
    moved, expected = (ours - start).detach(), (theirs - start).detach()
    # torch iterates in bfloat16.
    assert (moved - expected).norm() / expected.norm() < 0.02


def test_each_expert_is_a_matrix_of_its_own():
    g = torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(orthogonalize(g), torch.stack([orthogonalize(one) for one in g]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_restored_optimizer_goes_on_bit_for_bit(kind):
    whole = _parameters()
    optimizer = Optimizer(whole.items(), kind=kind, weight_decay=0.1)
    for step in range(3):
        _set_gradients(whole, step)
        optimizer.step(0.01)
    parts = {name: p.detach().clone().requires_grad_() for name, p in whole.items()}
    restored = Optimizer(parts.items(), kind=kind, weight_decay=0.1)
    restored.load_state({name: value.clone() for name, value in optimizer.state().items()})
    for step in range(3, 6):
        for named, one in ((whole, optimizer), (parts, restored)):
            _set_gradients(named, step)
            one.step(0.01)
    for name, parameter in whole.items():
        assert torch.equal(parameter, parts[name]), name


def test_a_state_of_other_parameters_is_refused():
    optimizer = Optimizer(_parameters().items())
    with pytest.raises(CheckpointError, match=r"remembers layers\.9\.q"):
        optimizer.load_state({"layers.9.q/exp_avg": torch.zeros(1)})


def test_forgotten_gradients_take_no_memory():
    named = _parameters()
    optimizer = Optimizer(named.items())
    _set_gradients(named, 0)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in named.values())


def test_what_is_remembered_of_a_transposed_parameter_comes_back_with_its_strides():
    def made() -> tuple[torch.nn.Parameter, Optimizer]:
        parameter = torch.nn.Parameter(torch.arange(12.0).reshape(4, 3).T)
        return parameter, Optimizer({"w": parameter}.items())

    def step(parameter: torch.nn.Parameter, optimizer: Optimizer, k: int) -> None:
        parameter.grad = torch.sin(torch.arange(12.0) * (k + 1)).reshape(4, 3).T
        optimizer.step(0.1)

    parameter, optimizer = made()
    step(parameter, optimizer, 0)
    # As a file gives it back.
    saved = {name: value.clone(memory_format=torch.contiguous_format) for name, value in optimizer.state().items()}
    other, resumed = made()
    other.data.copy_(parameter.data)
    resumed.load_state(saved)
    for one, its in ((parameter, optimizer), (other, resumed)):
        step(one, its, 1)
    assert torch.equal(parameter, other)
