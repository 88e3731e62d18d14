"""How a process spreads the loss over noise levels: M(lambda) = w(t) p(t) |dt/dlambda| (ERD, sec. 3.4, remark E.2).

p is the density of the times that are really drawn, w the weight of an error at such a time: with `as_sampling` nearly
all of M is in p, without it the same is in w.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from erdfast.process import Process
from erdfast.process.schedule import LOGSNR_LIMIT, LOGSNR_RANGE

NODES = 4001
"""Points over [-20, 20] for a continuous schedule; a discrete one has its steps."""


class Allocation(NamedTuple):
    """Curves over the log-SNR, each (N,) float64 on the CPU, from noisy to clean."""

    logsnr: Tensor
    spacing: Tensor
    """The log-SNR range nearest to each point: sums over it are integrals."""
    weight: Tensor
    """w, of the mean squared error in the network's own target."""
    density: Tensor
    """p(t)|dt/dlambda|: integrates to 1."""
    share: Tensor
    """M, divided by its integral."""
    omega: Tensor
    """ERD's recoverability of this target and schedule, with M's integral over [-10, 10]: beyond, nearly nothing is
    drawn, while the omega of eps and x0 does not fall."""
    mean_weight: float
    """Integral of M before that: the mean of w over the drawn times."""

    def probability(self, logsnr: Tensor) -> Tensor:
        """(L,): the chance that a drawn level is nearest to each of these, which rise; they add up to 1."""
        edges = 0.5 * (logsnr[1:] + logsnr[:-1])
        nearest = torch.bucketize(self.logsnr, edges)
        return torch.zeros_like(logsnr).index_add_(0, nearest, self.density * self.spacing)

    def average(self, logsnr: Tensor, values: Tensor, *, weighted: bool = False) -> float:
        """Mean over the drawn times of values known at some levels, linear in between and constant beyond.

        Args:
            logsnr, values: (L,), the former rising.
            weighted: of w times the values.
        """
        between = torch.from_numpy(np.interp(self.logsnr.numpy(), logsnr.numpy(), values.double().numpy()))
        weight = self.weight if weighted else 1.0
        return float((between * weight * self.density * self.spacing).sum())

    def median(self) -> float:
        """The log-SNR on either side of which half of M lies."""
        mass = torch.cumsum(self.share * self.spacing, 0)
        return float(self.logsnr[int(torch.searchsorted(mass, 0.5))])


@torch.no_grad()
def allocate(process: Process) -> Allocation:
    """Of a process, as it is now where its target is learnt."""
    where = process.rule_mean.device
    if process.schedule.num_timesteps is not None:
        t = torch.arange(process.schedule.num_timesteps, device=where).flip(0)
    else:
        t = process.schedule.t_from_logsnr(torch.linspace(-LOGSNR_LIMIT, LOGSNR_LIMIT, NODES, dtype=torch.float64))
        # Each once: beyond what the schedule reaches there are the times of its ends.
        t = torch.unique(t).flip(0).to(where)
    coef = process.coefficients(t, dtype=torch.float64)
    columns = (coef.logsnr, coef.w, process.logsnr_density(t), process.recoverability(t))
    logsnr, weight, density, omega = (column.cpu() for column in columns)
    spacing = _spacing(logsnr)
    density = density / (density * spacing).sum()  # what the trapezoids miss, 1e-3 at most
    product = weight * density
    mean_weight = (product * spacing).sum()
    share, inside = product / mean_weight, logsnr.abs() <= LOGSNR_RANGE
    omega = omega * (share * spacing)[inside].sum() / (omega * spacing)[inside].sum()
    return Allocation(logsnr, spacing, weight, density, share, omega, float(mean_weight))


def _spacing(points: Tensor) -> Tensor:
    """Half-way to each neighbour."""
    steps, none = points.diff(), points.new_zeros(1)
    return 0.5 * (torch.cat([none, steps]) + torch.cat([steps, none]))
