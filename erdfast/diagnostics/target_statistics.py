"""How predictable a target y = c_x*x0 + c_eps*eps is from x_t = alpha*x0 + sigma*eps: three numbers per noise level.

    correlation             Cov(y, x_t) / sqrt(Var y Var x_t)
    conditional mean        the root mean square of E[y | x_t] - E y over x_t: what of y can be predicted from x_t
    conditional variance    the mean of Var(y | x_t) over x_t: what cannot

all per element. For x0 with independent Gaussian elements of variance s^2 (Xu's article, section 3, has s = 1 and
alpha^2 + sigma^2 = 1), with V = alpha^2 s^2 + sigma^2 and C = c_x alpha s^2 + c_eps sigma:

    C / sqrt((c_x^2 s^2 + c_eps^2) V)        |C| / sqrt(V)        s^2 (c_x sigma - c_eps alpha)^2 / V

For any data, the first needs no more than their variance, and the others follow from the error of the best
prediction of x0, m = E Var(x0 | x_t), which depends on the log-SNR alone:

    Var(y | x_t) = ((c_x sigma - c_eps alpha) / sigma)^2 m          Var E[y | x_t] = Var y - Var(y | x_t)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from erdfast.process.coefficients import SPACES, Pair, Point
from erdfast.process.schedule import SCHEDULES, ContinuousSchedule, DiscreteSchedule, Schedule

QUANTITIES = {
    "correlation": "correlation with x_t",
    "mean": "conditional mean, rms",
    "variance": "conditional variance",
}
TARGETS = ("eps", "x0", "v", "score", "u", "k")


class Place(NamedTuple):
    """Places on a schedule with noise scale 1; each (L,) float64."""

    time: Tensor
    """Unit time: (t+1)/T of a discrete schedule."""
    logsnr: Tensor
    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    """d alpha/dt in unit time, as d_sigma."""
    d_sigma: Tensor


class Statistics(NamedTuple):
    """The three numbers, each (L,) float64."""

    correlation: Tensor
    mean: Tensor
    variance: Tensor


def build_schedule(name: str, num_timesteps: int = 1000) -> Schedule:
    """A row of SCHEDULES."""
    return SCHEDULES[name](num_timesteps, 1.0)


def preserves_variance(schedule: Schedule) -> bool:
    """Whether alpha^2 + sigma^2 = 1 all along."""
    return bool(torch.allclose(_total(places_in_time(schedule, 9)), torch.ones(9, dtype=torch.float64)))


def _total(place: Place) -> Tensor:
    return place.alpha.square() + place.sigma.square()


def places_in_time(schedule: Schedule, num: int) -> Place:
    """`num` places from the first time to the last, held at |log-SNR| = 20 on a continuous schedule."""
    if isinstance(schedule, DiscreteSchedule):
        t = torch.linspace(0, schedule.num_timesteps - 1, num, dtype=torch.float64).round().long()
    else:
        assert isinstance(schedule, ContinuousSchedule)
        t = torch.linspace(schedule.t_min, schedule.t_max, num, dtype=torch.float64)
    return _place(schedule, t)


def _place(schedule: Schedule, t: Tensor) -> Place:
    return Place(schedule.unit_time(t), schedule.logsnr(t), *schedule.alpha_sigma(t), *schedule.d_alpha_sigma(t))


def reached(schedule: Schedule, logsnr: Tensor) -> Tensor:
    """Which of these log-SNRs lie between the schedule's ends: (L,) bool."""
    ends = places_in_time(schedule, 2).logsnr
    return (logsnr <= ends[0]) & (logsnr >= ends[1])


def places_at(schedule: Schedule, logsnr: Tensor) -> Place:
    """The places with these log-SNRs, (L,) float64, all of which the schedule reaches.

    Between two steps of a discrete schedule, time and the slope of the log-SNR are interpolated in the log-SNR.
    """
    if isinstance(schedule, ContinuousSchedule):
        return _place(schedule, schedule.t_from_logsnr(logsnr))._replace(logsnr=logsnr)
    assert isinstance(schedule, DiscreteSchedule)
    steps = torch.arange(schedule.num_timesteps).flip(0)
    rising = schedule.logsnr(steps).numpy()

    def between(values: Tensor) -> Tensor:
        return torch.from_numpy(np.interp(logsnr.numpy(), rising, values.numpy()))

    alpha, sigma = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
    half_slope = 0.5 * between(schedule.d_logsnr(steps))
    slopes = alpha * sigma.square() * half_slope, -sigma * alpha.square() * half_slope
    return Place(between(schedule.unit_time(steps)), logsnr, alpha, sigma, *slopes)


def factors(target: str, place: Place, k: float) -> Pair:
    """(c_x, c_eps) of one of TARGETS, each (L,); `k` is k*x0 - (1-k)*eps."""
    if target == "k":
        return torch.full_like(place.alpha, k), torch.full_like(place.alpha, k - 1.0)
    point = Point(place.alpha, place.sigma, place.time, lambda: (place.d_alpha, place.d_sigma), 1.0)
    return SPACES[target](point)


def gaussian_statistics(place: Place, c: Pair, variance: float = 1.0) -> Statistics:
    """The closed forms above for Gaussian data with independent elements of one variance."""
    total = place.alpha.square() * variance + place.sigma.square()
    cross = c[0] * place.alpha * variance + c[1] * place.sigma
    own = c[0].square() * variance + c[1].square()
    left = variance * (c[0] * place.sigma - c[1] * place.alpha).square() / total
    return Statistics(cross / (own * total).sqrt(), cross.abs() / total.sqrt(), left)
