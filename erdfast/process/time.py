"""Which times are drawn: distributions over a schedule's times, drawn by inverse CDF from numbers u in (0,
1).

`Process` turns the counter-based generator's numbers into times with these, and uses the same objects for
averages over the distribution (normalised weights) and for drawing from the density p(t)*w(t)
(`as_sampling`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .. import philox
from .schedule import LOGSNR_RANGE, ContinuousSchedule, DiscreteSchedule, Schedule, Tables

CELLS = 4096
"""Cells of the quadrature over u; the midpoint rule then errs by less than 2e-6 for every ERD weight."""

MAX_DENSITY_RATIO = 100.0
"""Cap of the `logsnr` allocation's factor, whose mean is about 1: uniform draws on `flow` stay below 15 within the
log-SNR range, while a logit-normal's tails would ask for 1e6 and more from draws that never happen."""


class UnitSampler(ABC):
    """A distribution of the unit time in [0, 1]; tensors of any shape, float64."""

    def __init__(self, schedule: Schedule, logit_mean: float, logit_std: float) -> None:
        self.schedule = schedule
        self.logit_mean = logit_mean
        self.logit_std = logit_std

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Inverse of `cdf`."""

    @abstractmethod
    def cdf(self, t: Tensor) -> Tensor:
        """Probability of a time below t."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """Derivative of `cdf`."""

    def pmf(self, schedule: DiscreteSchedule) -> Tensor:
        """(T,): probability of each step, here that of its cell [t/T, (t+1)/T]."""
        edges = torch.arange(schedule.num_timesteps + 1, dtype=torch.float64, device="cpu")
        return self.cdf(edges / schedule.num_timesteps).diff()


class Uniform(UnitSampler):
    """All times equally likely."""

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def cdf(self, t: Tensor) -> Tensor:
        return t

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class LogitNormal(UnitSampler):
    """logit(t) ~ N(logit_mean, logit_std^2) (Stable Diffusion 3); t = 1 is noise, so the sign of a mean given
    for time-reversed papers is flipped."""

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))

    def standard(self, t: Tensor) -> Tensor:
        """(logit(t) - logit_mean)/logit_std."""
        return (torch.log(t) - torch.log1p(-t) - self.logit_mean) / self.logit_std

    def cdf(self, t: Tensor) -> Tensor:
        return torch.special.ndtr(self.standard(t))

    def density(self, t: Tensor) -> Tensor:
        normal = torch.exp(-0.5 * self.standard(t).square()) / math.sqrt(2.0 * math.pi)
        spread = t * (1.0 - t)
        return (normal / (self.logit_std * spread)).masked_fill(spread == 0, 0.0)


class UniformLogsnr(UnitSampler):
    """Uniform log-SNR: over the schedule's part of [-10, 10]; on a discrete schedule, a step's probability is in
    proportion to the log-SNR range nearest to it."""

    def __init__(self, schedule: Schedule, logit_mean: float, logit_std: float) -> None:
        super().__init__(schedule, logit_mean, logit_std)
        if isinstance(schedule, ContinuousSchedule):
            self.t_low, self.t_high, self.highest, self.lowest = logsnr_window(schedule)

    def quantile(self, u: Tensor) -> Tensor:
        return self.schedule.t_from_logsnr(self.highest - u * (self.highest - self.lowest))

    def cdf(self, t: Tensor) -> Tensor:
        return ((self.highest - self.schedule.logsnr(t)) / (self.highest - self.lowest)).clamp(0.0, 1.0)

    def density(self, t: Tensor) -> Tensor:
        outside = (t < self.t_low) | (t > self.t_high)
        return (self.schedule.d_logsnr(t) / (self.lowest - self.highest)).masked_fill(outside, 0.0)

    def pmf(self, schedule: DiscreteSchedule) -> Tensor:
        widths = schedule.logsnr_widths()
        return widths / widths.sum()


def logsnr_window(schedule: ContinuousSchedule) -> tuple[float, float, float, float]:
    """(smallest t, largest t, log-SNR there, log-SNR there) of the schedule's part within [-10, 10].

    Raises:
        ValueError: the noise scale leaves nothing of it.
    """
    ends = torch.tensor([LOGSNR_RANGE, -LOGSNR_RANGE], dtype=torch.float64, device="cpu")
    times = schedule.t_from_logsnr(ends)
    t_low, t_high = times.tolist()
    highest, lowest = schedule.logsnr(times).tolist()
    if not highest > lowest:
        raise ValueError(f"noise_scale={schedule.noise_scale} leaves no time with |log-SNR| below {LOGSNR_RANGE}")
    return t_low, t_high, highest, lowest


TIME_SAMPLERS: dict[str, type[UnitSampler]] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "uniform_logsnr": UniformLogsnr,
}
"""Every time sampler by name; any weighting is one more by `as_sampling`."""


class DiscreteTimes(Tables):
    """A distribution over the steps 0..T-1 as a table."""

    nodes: Tensor
    masses: Tensor
    cdf: Tensor
    importance_table: Tensor
    ratio_table: Tensor
    logsnr_density_table: Tensor

    def __init__(self, schedule: DiscreteSchedule, sampler: UnitSampler) -> None:
        super().__init__()
        self.register_buffer("nodes", torch.arange(schedule.num_timesteps, device="cpu"), persistent=False)
        pmf = sampler.pmf(schedule)
        logsnr_pmf = UniformLogsnr(schedule, 0.0, 1.0).pmf(schedule)
        self.table("masses", pmf)
        self.table("cdf", cumulative(pmf)[1:])
        self.table("ratio_table", (logsnr_pmf / pmf).clamp(max=MAX_DENSITY_RATIO))
        self.table("importance_table", torch.ones_like(pmf))
        self.table("logsnr_density_table", pmf / schedule.logsnr_widths())

    def tilt(self, weights: Tensor) -> None:
        """Draw in proportion to p(t)*weights(t) from now on; weights (T,) >= 0."""
        self.table("cdf", cumulative(self.masses * weights)[1:])
        mean = (self.masses * weights).sum()
        self.table("importance_table", torch.where(weights > 0, mean / weights, 1.0))
        self.table("logsnr_density_table", self.logsnr_density_table * weights / mean)

    def draw(self, u: Tensor) -> Tensor:
        """(B,) float64 in (0, 1) => int64 times."""
        return torch.searchsorted(self.cdf, u, right=True).clamp(max=self.cdf.shape[0] - 1)

    def importance(self, t: Tensor) -> Tensor:
        """p(t)/q(t), q being what `draw` draws from; 1 before `tilt`."""
        return self.importance_table[t]

    def logsnr_density(self, t: Tensor) -> Tensor:
        """Probability of drawing t over the log-SNR range nearest to it."""
        return self.logsnr_density_table[t]

    def density_ratio(self, t: Tensor) -> Tensor:
        """Probability of t under uniform log-SNR over that under this distribution, at most 100."""
        return self.ratio_table[t]


class ContinuousTimes(Tables):
    """A distribution over [0, 1], with cells in u = cdf(t) for averages and for the tilted density.

    The cells shrink towards both ends (the map of tanh-sinh quadrature), because weights may rise there as
    1/t^2 before they are held at |log-SNR| = 20. The tilted density is constant over a cell; `importance`
    divides by exactly that, so that expectations do not depend on how fine the cells are.
    """

    nodes: Tensor
    masses: Tensor
    edges: Tensor
    tilted_cdf: Tensor
    tilted_density: Tensor

    def __init__(self, schedule: ContinuousSchedule, sampler: UnitSampler) -> None:
        super().__init__()
        self.sampler = sampler
        self.logsnr_sampler = UniformLogsnr(schedule, 0.0, 1.0)
        x = torch.linspace(-2.5, 2.5, 2 * CELLS + 1, dtype=torch.float64, device="cpu")
        u = torch.sigmoid(math.pi * torch.sinh(x))
        edges = u[::2].clone()
        edges[0], edges[-1] = 0.0, 1.0
        self.table("edges", edges)
        self.table("masses", edges.diff())
        self.table("nodes", sampler.quantile(u[1::2]))
        self.table("tilted_cdf", edges)
        self.table("tilted_density", torch.ones_like(self.nodes))

    def tilt(self, weights: Tensor) -> None:
        """Draw in proportion to p(t)*weights(t) from now on; weights at the nodes, >= 0.

        No cell's density is below 1e-6 of the mean: what has a positive weight must be drawable.
        """
        mean = (self.masses * weights).sum()
        raised = weights.clamp(min=1e-6 * float(mean))
        self.table("tilted_cdf", cumulative(self.masses * raised))
        # Not the difference of the CDF: towards u = 1 that has few digits.
        self.table("tilted_density", raised / (self.masses * raised).sum())

    def draw(self, u: Tensor) -> Tensor:
        """(B,) float64 in (0, 1) => float64 times in [0, 1]."""
        cell = self.cell(self.tilted_cdf, u)
        start, end = self.tilted_cdf[cell], self.tilted_cdf[cell + 1]
        within = ((u - start) / (end - start)).clamp(0.0, 1.0)
        return self.sampler.quantile(torch.lerp(self.edges[cell], self.edges[cell + 1], within))

    def importance(self, t: Tensor) -> Tensor:
        """p(t)/q(t), q being what `draw` draws from; 1 before `tilt`."""
        u = self.sampler.cdf(t.to(torch.float64))
        return 1.0 / self.tilted_density[self.cell(self.edges, u)]

    def logsnr_density(self, t: Tensor) -> Tensor:
        """Density of what `draw` draws, per unit of log-SNR."""
        t = t.to(torch.float64)
        tilt = self.tilted_density[self.cell(self.edges, self.sampler.cdf(t))]
        return self.sampler.density(t) * tilt / -self.sampler.schedule.d_logsnr(t)

    def density_ratio(self, t: Tensor) -> Tensor:
        """Density of uniform log-SNR over that of this distribution, at most 100; held outside [-10, 10]."""
        t = t.to(torch.float64).clamp(self.logsnr_sampler.t_low, self.logsnr_sampler.t_high)
        return (self.logsnr_sampler.density(t) / self.sampler.density(t)).clamp(max=MAX_DENSITY_RATIO)

    @staticmethod
    def cell(edges: Tensor, u: Tensor) -> Tensor:
        """Index of the cell that holds u."""
        return (torch.searchsorted(edges, u.contiguous(), right=True) - 1).clamp(0, edges.shape[0] - 2)


def cumulative(masses: Tensor) -> Tensor:
    """(N,) => (N+1,): from 0 to exactly 1."""
    total = torch.cumsum(masses, dim=0)
    return torch.cat([torch.zeros_like(total[:1]), total / total[-1]])


def build_times(schedule: Schedule, sampler: UnitSampler) -> DiscreteTimes | ContinuousTimes:
    """The distribution's tables for this kind of schedule."""
    if isinstance(schedule, DiscreteSchedule):
        return DiscreteTimes(schedule, sampler)
    assert isinstance(schedule, ContinuousSchedule)
    return ContinuousTimes(schedule, sampler)


def uniform_numbers(seed: philox.Integer, step: philox.Integer, ids: Tensor, strata: int | None) -> Tensor:
    """One number in (0, 1) per sample of the global batch, a function of (seed, step, id) alone.

    Args:
        seed, step: ints or 0-d int64 tensors.
        ids: (B,) int64, indices in the global batch.
        strata: None for independent numbers; else the size G of the global batch: sample i then falls into
            the stratum [k/G, (k+1)/G] with k = permutation(i), a permutation drawn anew in every step, so
            that no rank and no slot of the loader is tied to a noise level.

    Returns:
        (B,) float64.
    """
    u = philox.uniform(seed, step, ids, "time")
    if strata is None:
        return u
    everyone = torch.arange(strata, dtype=torch.int64, device=ids.device)
    keys = philox.uniform(seed, step, everyone | _PERMUTATION_IDS, "time")
    permutation = torch.argsort(keys, stable=True)
    return ((permutation[ids] + u) / strata).clamp(max=1.0 - 2.0**-53)


_PERMUTATION_IDS = 1 << 62
"""Ids with this bit give the keys of the permutation; no global batch is that large. (Set, not added: inductor would
add it to its own 32-bit index.)"""
