"""The linear theory against the optimal layer found by least squares, and against its closed forms."""

from __future__ import annotations

import pytest
import torch

from erdfast.diagnostics.linear_theory import NODES, best_k, k_star, loss_of_process, optimal_loss
from erdfast.process import Process


def learnable(k: float, **options) -> Process:
    return Process("flow", "k", "constant", k_init=k, **options)


@pytest.mark.parametrize(("ambient", "intrinsic"), [(64, 1), (64, 16), (64, 64), (10, 3)])
def test_the_special_case_has_the_papers_optimum(ambient, intrinsic):
    """Eq. 14 from eq. 12."""
    assert best_k(learnable(0.5), ambient, intrinsic) == pytest.approx(k_star(ambient, intrinsic), abs=6e-4)
    assert k_star(ambient, intrinsic) == ambient / (ambient + intrinsic)


@pytest.mark.parametrize("k", [0.1, 0.5, 0.9])
def test_the_special_case_in_closed_form(k):
    """Eq. 54d: [2(D+d)k^2 - 4Dk + 2D + 3d]/16."""
    for ambient, intrinsic in ((64, 4), (7, 7)):
        wanted = (2 * (ambient + intrinsic) * k**2 - 4 * ambient * k + 2 * ambient + 3 * intrinsic) / 16
        assert float(loss_of_process(learnable(k), ambient, intrinsic)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("loss_space", ["target", "u"])
def test_against_the_layer_that_least_squares_finds(loss_space):
    """W minimises a quadratic form; its minimum is written out with matrices, without the modes of the theory."""
    ambient, intrinsic = 6, 2
    process = learnable(0.7, loss_space=loss_space, **({} if loss_space == "target" else {"kappa_clip": 0.05}))
    t = (torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES
    with torch.no_grad():
        c = process.coefficients(t, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(ambient, ambient, generator=torch.Generator().manual_seed(0)).double()).Q
    data, one = basis[:, :intrinsic] @ basis[:, :intrinsic].T, torch.eye(ambient, dtype=torch.float64)

    def mean(of_data: torch.Tensor, of_noise: torch.Tensor) -> torch.Tensor:
        return (c.w * of_data).mean() * data + (c.w * of_noise).mean() * one

    zz, uz = mean(c.alpha**2, c.sigma**2), mean(c.c_x * c.alpha, c.c_eps * c.sigma)
    layer = torch.linalg.solve(zz, uz.T).T
    wanted = 0.5 * (mean(c.c_x**2, c.c_eps**2) - layer @ uz.T).trace()
    assert float(loss_of_process(process, ambient, intrinsic)) == pytest.approx(float(wanted), rel=1e-9)


def test_without_codimension_data_and_noise_are_alike():
    """d = D is symmetric in k and 1 - k."""
    left, right = (float(loss_of_process(learnable(k), 5, 5)) for k in (0.2, 0.8))
    assert left == pytest.approx(right)


def test_x0_prediction_has_no_loss_across():
    """psi = 0 (the paper's fourth remark): the loss does not depend on D."""
    one = torch.ones(NODES, dtype=torch.float64)
    t = (torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES
    losses = [float(optimal_loss(1 - t, t, one, 0 * one, one / NODES, ambient, 3)) for ambient in (3, 50)]
    assert losses[0] == pytest.approx(losses[1])


def test_the_process_is_left_as_it_was():
    process = learnable(0.3)
    before = [p.detach().clone() for p in process.parameters()]
    best_k(process, 8, 2)
    assert all(torch.equal(p, b) for p, b in zip(process.parameters(), before, strict=True))
