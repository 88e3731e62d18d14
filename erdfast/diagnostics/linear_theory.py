"""What the linear theory of k-Diff says: the least loss of one linear layer on a d-dimensional subspace (eq. 12).

    Delta* = d/2     ( <phi^2 + psi^2> - <phi alpha + psi sigma>^2 / <alpha^2 + sigma^2> )
           + (D-d)/2 ( <psi^2>         - <psi sigma>^2             / <sigma^2>           )

<f> is the integral of f over time by the effective measure: that of the drawn times, times the weight of an error.
Eq. 12 has one linear layer for all times, x = P z with P'P = 1, and z of unit covariance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from erdfast.process import Process

NODES = 4096
"""Points of the midpoint rule in time."""


def optimal_loss(
    alpha: Tensor, sigma: Tensor, phi: Tensor, psi: Tensor, measure: Tensor, ambient: int, intrinsic: int
) -> Tensor:
    """Eq. 12.

    Args:
        alpha, sigma, phi, psi, measure: (N,) float64 at the points of a quadrature; its weights are in `measure`.
        ambient, intrinsic: D and d, 1 <= d <= D.

    Returns:
        0-d float64, the squared error summed over D dimensions, times 1/2.
    """

    def mean(values: Tensor) -> Tensor:
        return (measure * values).sum()

    along = mean(phi**2 + psi**2) - mean(phi * alpha + psi * sigma) ** 2 / mean(alpha**2 + sigma**2)
    across = mean(psi**2) - mean(psi * sigma) ** 2 / mean(sigma**2)
    return 0.5 * (intrinsic * along + (ambient - intrinsic) * across)


def loss_of_process(process: Process, ambient: int, intrinsic: int) -> Tensor:
    """Eq. 12 for a process on a continuous schedule with uniform times: its own c_x, c_eps and w."""
    t = (torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES
    with torch.no_grad():
        c = process.coefficients(t, dtype=torch.float64)
    return optimal_loss(c.alpha, c.sigma, c.c_x, c.c_eps, c.w / NODES, ambient, intrinsic)


def k_star(ambient: int, intrinsic: int) -> float:
    """D/(D + d): where eq. 12 is least on `flow`, for uniform times and an error in the target's own space (eq. 14)."""
    return ambient / (ambient + intrinsic)


def best_k(process: Process, ambient: int, intrinsic: int) -> float:
    """The k of a learnable target `k` at which eq. 12 is least, to three digits; the process is left as it was."""
    (w_k,) = process.parameters()
    before = w_k.detach().clone()
    grid = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    losses = []
    try:
        for k in grid:
            with torch.no_grad():
                w_k.fill_(torch.logit(k))
            losses.append(loss_of_process(process, ambient, intrinsic))
    finally:
        with torch.no_grad():
            w_k.copy_(before)
    return float(grid[int(torch.stack(losses).argmin())])
