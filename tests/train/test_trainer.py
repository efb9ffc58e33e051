"""One step: its loss by hand, how it is cut into passes, what is skipped, what ends it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ossia.errors import TrainingError, UnavailableError
from ossia.ops import Batch
from ossia.train.optimizers import Optimizer
from ossia.train.schedule import Schedule
from ossia.train.trainer import Terms, Trainer, memory_errors, random_state, set_random_state, to_device


@dataclass(frozen=True)
class Rows:
    x_RI: np.ndarray
    y_R: np.ndarray
    weights_R: np.ndarray

    @property
    def num_tokens(self):
        return len(self.y_R)


class Regression:
    """Weighted squares of a linear map: small enough to be computed by hand."""

    def __init__(self):
        self.w_I = torch.tensor([1.0, -1.0], requires_grad=True)

    def weight(self, batch):
        return float(batch.weights_R.sum())

    def terms(self, batch):
        squares_R = (batch.x_RI @ self.w_I - batch.y_R) ** 2
        return Terms((squares_R * batch.weights_R).sum(), {"rows": float(len(batch.y_R))})


def _rows(seed, num_rows):
    generator = np.random.default_rng(seed)
    x, y, w = generator.normal(size=(num_rows, 2)), generator.normal(size=num_rows), generator.random(num_rows)
    return Rows(x.astype(np.float32), y.astype(np.float32), w.astype(np.float32))


def _joined(parts):
    return Rows(*(np.concatenate([getattr(p, n) for p in parts]) for n in ("x_RI", "y_R", "weights_R")))


def _trainer(**settings):
    objective = Regression()
    optimizer = Optimizer([("w", objective.w_I)])
    return Trainer(objective, optimizer, Schedule("constant", 10), highest_rate=0.1, **settings)


def test_the_loss_is_the_weighted_mean_over_the_whole_step():
    trainer = _trainer()
    one = Rows(np.array([[1, 0], [0, 2]], np.float32), np.array([0, 1], np.float32), np.array([1, 0.5], np.float32))
    two = Rows(np.array([[1, 1]], np.float32), np.array([2], np.float32), np.array([0.25], np.float32))
    report = trainer.step([one, two])
    # Residuals are 1, -3 and -2.
    assert report.loss == pytest.approx((1 * 1 + 0.5 * 9 + 0.25 * 4) / 1.75)
    gradient = (np.array([2 * 1, 0]) + 0.5 * np.array([0, 2 * -3 * 2]) + 0.25 * np.array([2 * -2, 2 * -2])) / 1.75
    assert report.gradient_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-6)
    assert (report.step, report.num_tokens, report.weight, report.learning_rate) == (1, 3, 1.75, 0.1)
    assert report.shown == {"rows": pytest.approx(3 / 1.75)}


def test_how_a_step_is_cut_into_passes_changes_nothing():
    parts = [_rows(seed, num_rows) for seed, num_rows in enumerate((1, 7, 2, 5))]
    whole, cut = _trainer(), _trainer()
    for _ in range(3):
        a, b = whole.step([_joined(parts)]), cut.step(parts)
        assert a.loss == pytest.approx(b.loss, rel=1e-6) and a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-5)
    torch.testing.assert_close(whole.objective.w_I, cut.objective.w_I)


def test_a_large_gradient_is_scaled_down_to_the_clip():
    free, clipped = _trainer(clip=0.0), _trainer(clip=1e-3)
    seen = {}
    for name, trainer in (("free", free), ("clipped", clipped)):
        move = trainer.optimizer.step

        def step(rate, name=name, trainer=trainer, move=move):
            seen[name] = trainer.objective.w_I.grad.clone()
            move(rate)

        trainer.optimizer.step = step
        trainer.step([_rows(0, 8)])
    assert seen["clipped"].norm().item() == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(seen["clipped"] / seen["clipped"].norm(), seen["free"] / seen["free"].norm())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_reported(bad):
    trainer = _trainer()
    trainer.step([_rows(0, 4)])
    weights, memory = trainer.objective.w_I.detach().clone(), trainer.optimizer.state()
    memory = {name: value.clone() for name, value in memory.items()}
    rows = _rows(1, 4)
    rows.y_R[2] = bad
    report = trainer.step([_rows(2, 4), rows])
    assert report.is_skipped and not math.isfinite(report.loss)
    assert torch.equal(trainer.objective.w_I, weights)
    assert all(torch.equal(value, memory[name]) for name, value in trainer.optimizer.state().items())
    assert trainer.num_steps_done == 2
    assert not trainer.step([_rows(3, 4)]).is_skipped
    assert not torch.equal(trainer.objective.w_I, weights)


def test_too_many_skipped_steps_in_a_row_end_the_run_and_a_good_one_between_starts_the_count_again():
    trainer = _trainer(max_skipped=2)
    bad = _rows(1, 4)
    bad.y_R[0] = np.nan
    for _ in range(3):
        trainer.step([bad])
        trainer.step([_rows(2, 4)])
    trainer.step([bad])
    with pytest.raises(TrainingError, match=r"2 steps in a row, up to step 8, .*lower learning_rate"):
        trainer.step([bad])


def test_a_step_without_anything_to_train_is_an_error():
    rows = _rows(0, 3)
    rows.weights_R[:] = 0
    with pytest.raises(TrainingError, match="step 1 has nothing to train"):
        _trainer().step([rows])


def test_too_little_memory_says_what_to_lower():
    with pytest.raises(UnavailableError, match=r"memory is too small .*Lower max_tokens"), memory_errors():
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="size"), memory_errors():
        torch.zeros(2) @ torch.zeros(3)


def test_a_batch_is_sent_as_tensors_with_all_that_is_in_it():
    array = np.arange(3, dtype=np.int32)
    batch = Batch(*[array] * 7)
    sent = to_device(batch, torch.device("cpu"))
    names = [name for name in Batch.__slots__ if isinstance(getattr(batch, name), np.ndarray)]
    assert len(names) == 7
    assert all(torch.equal(getattr(sent, name), torch.tensor([0, 1, 2], dtype=torch.int32)) for name in names)


def test_random_numbers_go_on_where_they_were():
    states = random_state()
    first = torch.rand(5)
    set_random_state(states)
    assert torch.equal(torch.rand(5), first)
