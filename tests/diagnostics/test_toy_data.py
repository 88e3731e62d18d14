"""The toy's points and what is known of them, against the definitions and against one-dimensional quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from erdfast.diagnostics.toy_data import CORNERS, PROCESSES, TARGETS, Task, bayes_floor, held_out

AMPLITUDES = {
    "flow": lambda t: (1 - t, t),
    "vp": lambda t: (a := math.exp(-(19.9 * t**2) / 4 - 0.05 * t), math.sqrt(1 - a**2)),
    "gvp": lambda t: (math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)),
}
COMBINED = {
    "eps": lambda x0, eps, a, s: eps,
    "x0": lambda x0, eps, a, s: x0,
    "v": lambda x0, eps, a, s: a * eps - s * x0,
    "u": lambda x0, eps, a, s: eps - x0,
}


@pytest.mark.parametrize("process", PROCESSES)
def test_targets_are_those_of_the_paper(process):
    """On every process, u included: from the same samples and noise."""
    t = 0.35
    found = {target: held_out(Task(process, target), t, 20, 0) for target in TARGETS}
    x0, eps = found["x0"].y.double(), found["eps"].y.double()
    alpha, sigma = AMPLITUDES[process](t)
    for target, points in found.items():
        wanted = COMBINED[target](x0, eps, alpha, sigma)
        torch.testing.assert_close(points.y.double(), wanted, rtol=0, atol=2e-6)
        torch.testing.assert_close(points.x_t.double(), alpha * x0 + sigma * eps, rtol=0, atol=2e-6)
        assert points.time.tolist() == pytest.approx([t] * 80)


def test_points_are_the_same_at_every_time_and_ordered_by_mode():
    early, late = (held_out(Task("flow", "x0"), t, 50, 3) for t in (0.1, 0.9))
    assert torch.equal(early.y, late.y)
    assert early.mode.tolist() == [mode for mode in range(4) for _ in range(50)]
    distance = (early.y.flatten(1) - torch.tensor(CORNERS)[early.mode]).norm(dim=1)
    assert float(distance.max()) < 0.3 * 5
    assert float(distance.square().mean()) == pytest.approx(2 * 0.09, rel=0.25)
    assert not torch.equal(early.y, held_out(Task("flow", "x0"), 0.1, 50, 4).y)
    assert len(held_out(Task("flow", "x0"), 0.1, 1, 3).mode) == 4


def posterior_mean(x_t: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x0 | x_t] of each element on its own (the four modes are a product of two), by quadrature."""
    grid = torch.linspace(-5, 5, 8001, dtype=torch.float64)
    prior = torch.exp(-((grid - 2) ** 2) / 0.18) + torch.exp(-((grid + 2) ** 2) / 0.18)
    weight = prior * torch.exp(-((x_t.double().flatten()[:, None] - alpha * grid) ** 2) / (2 * sigma**2))
    return ((weight * grid).sum(1) / weight.sum(1)).view_as(x_t)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_best_prediction_is_the_conditional_mean(process, target):
    t = 0.45
    points = held_out(Task(process, target), t, 10, 0)
    alpha, sigma = AMPLITUDES[process](t)
    x0 = posterior_mean(points.x_t, alpha, sigma)
    eps = (points.x_t.double() - alpha * x0) / sigma
    torch.testing.assert_close(points.best, COMBINED[target](x0, eps, alpha, sigma), rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_the_floor_is_the_error_of_the_best_prediction(target):
    task, times = Task("gvp", target), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    floor = bayes_floor(task, times, 0)
    for at, least in zip(times.tolist(), floor.tolist(), strict=True):
        points = held_out(task, at, 2500, 0)
        assert float((points.y - points.best).square().mean()) == pytest.approx(least, rel=0.04)


def test_names_that_the_toy_does_not_have_are_refused():
    with pytest.raises(ValueError, match="unknown process 'cosine' of the toy; choose from flow, vp, gvp"):
        Task("cosine", "eps")
    with pytest.raises(ValueError, match="unknown target 'score' of the toy; choose from eps, x0, v, u"):
        Task("flow", "score")
