"""What the linear theory of k-Diff says: the best linear layer and its loss, for any target (theorems 3.1 and 3.2).

One layer serves all times; the data have mean 0 and a covariance with the eigenvalues v_1 .. v_D. Each eigenvector is
then a problem of its own, with the best factor and the least loss

    g(v)     = <phi alpha v + psi sigma> / <alpha^2 v + sigma^2>
    Delta(v) = 1/2 ( <phi^2 v + psi^2> - <phi alpha v + psi sigma>^2 / <alpha^2 v + sigma^2> )

where the target is phi*x0 + psi*eps and <f> is the integral of f over time by the effective measure: that of the drawn
times, times the weight of an error. The paper's subspace, x = P z with P'P = 1 and z of unit covariance, has v = 1 d
times and v = 0 D-d times: W* = g(1) P P' + g(0) (1 - P P') (eq. 11) and Delta* = d Delta(1) + (D-d) Delta(0) (eq. 12).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from erdfast.process import Process

_GRID = 65
"""Values of k among which the least loss is first looked for."""
_HALVINGS = 45
_EQUAL = 1e-13
"""Relative difference of losses that only rounding makes."""
_LARGEST_LOGIT = 16.0
"""k is looked for from 1e-7 to 1 - 1e-7."""


class Averages(NamedTuple):
    """All that the theory takes from target, process and measure; 0-d float64."""

    phi2: Tensor
    psi2: Tensor
    phi_alpha: Tensor
    psi_sigma: Tensor
    alpha2: Tensor
    sigma2: Tensor


def averages(alpha: Tensor, sigma: Tensor, phi: Tensor, psi: Tensor, measure: Tensor) -> Averages:
    """<phi^2>, <psi^2>, <phi alpha>, <psi sigma>, <alpha^2>, <sigma^2>.

    Args:
        alpha, sigma, phi, psi, measure: (N,) float64 at the points of a quadrature; its weights are in `measure`.
    """
    values = (phi**2, psi**2, phi * alpha, psi * sigma, alpha**2, sigma**2)
    return Averages(*((measure * value).sum() for value in values))


def averages_of(process: Process) -> Averages:
    """Of a process, with its own target, weights and drawn times. Gradients reach the numbers of a learnable target."""
    c = process.coefficients(process.times.nodes, dtype=torch.float64)
    return averages(c.alpha, c.sigma, c.c_x, c.c_eps, c.w * process.times.masses)


def subspace_variances(ambient: int, intrinsic: int) -> Tensor:
    """The spectrum of the paper's data: (D,) float64, d ones and then zeros.

    Raises:
        ValueError: not 1 <= d <= D.
    """
    if not 1 <= intrinsic <= ambient:
        raise ValueError(f"intrinsic dimension {intrinsic} must lie between 1 and the ambient dimension {ambient}")
    return torch.cat([torch.ones(intrinsic), torch.zeros(ambient - intrinsic)]).double()


def optimal_gains(found: Averages, variances: Tensor) -> Tensor:
    """The eigenvalues of the best layer W*, which shares its eigenvectors with the data (eq. 11): like `variances`."""
    return (found.phi_alpha * variances + found.psi_sigma) / (found.alpha2 * variances + found.sigma2)


def optimal_loss(found: Averages, variances: Tensor) -> Tensor:
    """Delta*: the squared error of the best layer, summed over D dimensions, times 1/2 (eq. 12).

    Args:
        variances: (D,) float64 eigenvalues of the data's covariance, at least 0.

    Returns:
        0-d float64.
    """
    explained = (found.phi_alpha * variances + found.psi_sigma).square() / (found.alpha2 * variances + found.sigma2)
    return 0.5 * (found.phi2 * variances + found.psi2 - explained).sum()


def layer_loss(found: Averages, layer: Tensor, covariance: Tensor) -> Tensor:
    """The same loss of any layer on data of mean 0 (eq. 4): 1/2 tr(W <zz'> W' - 2 <uz'> W' + <uu'>).

    Args:
        layer, covariance: (D, D) float64.

    Returns:
        0-d float64, at least `optimal_loss`.
    """
    one = torch.eye(covariance.shape[0], dtype=covariance.dtype)
    noisy = found.alpha2 * covariance + found.sigma2 * one
    cross = found.phi_alpha * covariance + found.psi_sigma * one
    target = found.phi2 * covariance + found.psi2 * one
    return 0.5 * torch.trace(layer @ noisy @ layer.T - 2.0 * cross @ layer.T + target)


def k_star(ambient: float, intrinsic: float) -> float:
    """D/(D + d): where eq. 12 is least on `flow`, for uniform times and an error in the target's own space (eq. 14)."""
    return ambient / (ambient + intrinsic)


def optimal_k(alpha: Tensor, sigma: Tensor, measure: Tensor, variances: Tensor, noise_scale: float = 1.0) -> Tensor:
    """Where Delta* is least for the target k*x0 - (1-k)*noise if the measure does not depend on k: a parabola's vertex.

    With A = <1>, p = v<alpha>, q = s<sigma>, S = v<alpha^2> + <sigma^2> and the noise scale s, summed over v:
    k* = sum(A s^2 - q(p+q)/S) / sum(A (v + s^2) - (p+q)^2/S), kept within [0, 1]. D/(D + d) is a special case.

    Args:
        alpha, sigma, measure: as for `averages`.
        variances: (D,) float64, as for `optimal_loss`.
        noise_scale: s, which sigma includes.

    Returns:
        0-d float64.
    """
    mass, p, q = measure.sum(), variances * (measure * alpha).sum(), noise_scale * (measure * sigma).sum()
    noisy = variances * (measure * alpha**2).sum() + (measure * sigma**2).sum()
    above = mass * noise_scale**2 - q * (p + q) / noisy
    below = mass * (variances + noise_scale**2) - (p + q).square() / noisy
    return (above.sum() / below.sum()).clamp(0.0, 1.0)


def best_k(process: Process, variances: Tensor) -> float:
    """The k of a process with the target `k` at which Delta* is least, also where its weights depend on k.

    The least of a grid, then the zero of dDelta*/dw_k between its neighbours: to 1e-12, within [1e-7, 1 - 1e-7]. If
    several are equally good, as k and 1-k for d = D, the largest.

    Args:
        process: of any schedule, weighting, loss space and time sampler; it is left as it was.
        variances: (D,) float64, as for `optimal_loss`.

    Raises:
        ValueError: another target.
    """
    if process.target_name != "k":
        raise ValueError(f"the best k is that of a process with target 'k', not {process.target_name!r}")
    own = Process(**process.describe()).double()  # pyright: ignore[reportArgumentType]  # names and values of its options
    (w_k,) = own.parameters()

    def loss_at(logit: float) -> Tensor:
        with torch.no_grad():
            w_k.fill_(logit)
        return optimal_loss(averages_of(own), variances)

    def rising(logit: float) -> bool:
        return float(torch.autograd.grad(loss_at(logit), w_k)[0]) > 0

    grid = torch.linspace(-_LARGEST_LOGIT, _LARGEST_LOGIT, _GRID, dtype=torch.float64).tolist()
    with torch.no_grad():
        losses = [float(loss_at(logit)) for logit in grid]
    least = max(i for i, loss in enumerate(losses) if loss <= min(losses) * (1.0 + _EQUAL))
    low, high = grid[max(least - 1, 0)], grid[min(least + 1, _GRID - 1)]
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if rising(middle) else (middle, high)
    return float(torch.sigmoid(torch.tensor(0.5 * (low + high), dtype=torch.float64)))


class TrainedLayer(NamedTuple):
    """What gradient descent found."""

    layer: Tensor
    """(D, D) float64, W."""

    k: float
    """Of the target at the end."""


def train_layer(
    process: Process, root: Tensor, *, learn_k: bool, steps: int = 1000, batch: int = 512, seed: int = 0
) -> TrainedLayer:
    """Train one linear layer by Adam on fresh samples, from zero, its rate falling to 0 along half a cosine.

    Args:
        process: with the target `k`; its k is changed if it is learnt.
        root: (D, r) float64; the data are root @ z with standard normal z.
        learn_k: train k along with the layer.
        batch: samples per step.
        seed: of samples, noise and times.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = torch.zeros(root.shape[0], root.shape[0], dtype=torch.float64, requires_grad=True)
    learnt = list(process.parameters()) if learn_k else []
    optimizer = torch.optim.Adam([{"params": [layer]}, {"params": learnt, "lr": 0.05}], lr=0.02, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    times = process.sample_time(steps * batch, seed=seed, step=0).unflatten(0, (steps, batch))

    def normal(width: int) -> Tensor:
        return torch.randn(batch, width, dtype=torch.float64, generator=generator)

    for step in range(steps):
        x0, noise = normal(root.shape[1]) @ root.T, normal(root.shape[0])
        c = process.coefficients(times[step], dtype=torch.float64)
        noisy = c.alpha[:, None] * x0 + c.sigma[:, None] * noise
        error = noisy @ layer.T - (c.c_x[:, None] * x0 + c.c_eps[:, None] * noise)
        optimizer.zero_grad()
        (c.w * error.square().sum(1)).mean().backward()
        optimizer.step()
        rate.step()
    return TrainedLayer(layer.detach(), float(process.target_values()["k"]))
