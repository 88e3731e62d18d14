"""The ERD paper's toy (appendix F.1): four modes in the plane, three processes, four targets, known in closed form.

Samples are pictures of two channels and one pixel, (B, 2, 1, 1), so that the package's data, processes and ops serve.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from erdfast.data import GaussianMixture
from erdfast.ops import NoiseKey, add_noise
from erdfast.process import Coefficients, Process

PROCESSES = ("flow", "vp", "gvp")
TARGETS = ("eps", "x0", "v", "u")
CORNERS = ((2.0, 2.0), (-2.0, 2.0), (-2.0, -2.0), (2.0, -2.0))
STD = 0.3
FIRST_HELD_OUT = 2**39
"""Samples from here on are never trained on, nor is the noise of this stream."""
HELD_OUT_STREAM = 2**31


def toy_mixture(seed: int) -> GaussianMixture:
    """Modes at (+-2, +-2) of standard deviation 0.3, labelled 0..3 in turn around the origin."""
    means = torch.tensor(CORNERS, dtype=torch.float64).view(4, 2, 1, 1)
    return GaussianMixture.of_means(means, std=STD, size=2 * FIRST_HELD_OUT, seed=seed)


class Task:
    """What is to be predicted: one target under one process, every time equally likely, plain squared error.

    Args:
        process: a name of PROCESSES.
        target: a name of TARGETS; `u` is eps - x0 on every process, as the paper has it, and not the velocity of the
            process, which on vp is infinite at t = 0.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, process: str, target: str) -> None:
        for what, name, names in (("process", process, PROCESSES), ("target", target, TARGETS)):
            if name not in names:
                raise ValueError(f"unknown {what} {name!r} of the toy; choose from {', '.join(names)}")
        self.target = target
        self.process = Process(process, "eps" if target == "u" else target, "constant")

    def coefficients(self, t: Tensor) -> Coefficients:
        """Of times (B,) in [0, 1]: float32, w = 1."""
        found = self.process.coefficients(t)
        if self.target != "u":
            return found
        one = torch.ones_like(found.c_x)
        return found._replace(c_x=-one, c_eps=one)


class Points(NamedTuple):
    """Held-out points at one time, ordered by mode; (N, 2, 1, 1) each."""

    x_t: Tensor
    """float32."""
    y: Tensor
    """What the network is to predict; float32."""
    best: Tensor
    """E[y | x_t]; float64."""
    mode: Tensor
    """(N,) 0..3."""
    time: Tensor
    """(N,) what the network receives."""


def held_out(task: Task, at: float, per_mode: int, seed: int) -> Points:
    """The same samples and noise for every task and time."""
    x0, mode, ids = _samples(per_mode, seed)
    coef = task.coefficients(torch.full((len(ids),), at))
    key = NoiseKey(seed, HELD_OUT_STREAM, ids)
    x_t = add_noise(x0, coef, key)
    y = add_noise(x0, coef._replace(alpha=coef.c_x, sigma=coef.c_eps), key)
    best = toy_mixture(seed).target_mean(x_t, coef.alpha, coef.sigma, coef.c_x, coef.c_eps)
    return Points(x_t, y, best, mode, coef.time)


@cache
def _samples(per_mode: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, 2, 1, 1) samples, their modes and ids, ordered by mode; to be left as they are."""
    data = toy_mixture(seed)
    ids = FIRST_HELD_OUT + torch.arange(8 * per_mode + 64)  # twice as many as are needed: each mode has its share
    modes = data.modes(ids)
    ids = torch.cat([ids[modes == mode][:per_mode] for mode in range(4)])
    return data.gather(ids).x, modes[ids - FIRST_HELD_OUT], ids


def bayes_floor(task: Task, times: Tensor, seed: int, num_samples: int = 20_000) -> Tensor:
    """The least possible mean squared error at each time: (T,) float64."""
    c = task.coefficients(times)
    return toy_mixture(seed).bayes_floor(c.alpha, c.sigma, c.c_x, c.c_eps, num_samples=num_samples)
