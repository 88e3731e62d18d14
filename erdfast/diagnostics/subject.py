"""A trained network to be measured: what it is, which noise levels it is looked at, and on which images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from erdfast.data import Dataset
from erdfast.models import Backbone
from erdfast.ops import Moments
from erdfast.process import Coefficients, Process
from erdfast.process.schedule import LOGSNR_RANGE
from erdfast.training.precision import PrecisionPolicy

NOISE_STREAM = 1 << 31
"""Of the first level's noise: beyond the steps of any training, which number streams of the same seed."""


class Subject(NamedTuple):
    """A network with all that belongs to it."""

    name: str
    """For legends; no two subjects of a page have the same."""
    step: int
    """Optimiser steps; 0 where nobody says it."""
    model: Backbone
    """In evaluation mode."""
    process: Process
    dataset: Dataset
    data: str
    """What the data are called on the command line."""
    precision: PrecisionPolicy
    published: bool = False
    """Whether it is somebody's checkpoint: how its errors were weighed is then not known."""
    ignores_labels: bool = False
    """Whether it was trained on the null class alone."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def labels(self, y: Tensor) -> Tensor | None:
        """What the network is told about images with labels y, (B,) int64: their classes, if it has any."""
        if self.model.num_classes == 0:
            return None
        if self.ignores_labels or self.dataset.num_classes == 0:
            return torch.full_like(y, self.model.num_classes)
        return y

    def predict(self, x_t: Tensor, coef: Coefficients, y: Tensor | None) -> Tensor:
        """The prediction alone, without a learned variance: (B, C, H, W)."""
        with self.precision.autocast():
            return self.model(x_t, coef.time, y)[:, : x_t.shape[1]]


class Levels(NamedTuple):
    """Noise levels of one process, from noisy to clean."""

    time: Tensor
    """(L,) on the device of the process: int64, or float64 on a continuous schedule."""
    logsnr: Tensor
    """(L,) float64 on the CPU, rising."""
    coef: Coefficients
    """Of these times: (L,) float64 on the CPU, without gradients."""


def shared_logsnr(processes: Sequence[Process], num: int) -> Tensor:
    """(num,) float64: equal steps of log-SNR over what all the processes reach within [-10, 10].

    Not at the times that training draws: those of two schedules are different levels, and a weighting is judged best
    where each level counts the same. Beyond +-10 data or noise is lost in the rounding of bf16.

    Raises:
        ValueError: there is no level that all of them reach.
    """
    ends = [_reach(process) for process in processes]
    low = max(-LOGSNR_RANGE, *(low for low, _ in ends))
    high = min(LOGSNR_RANGE, *(high for _, high in ends))
    if not low < high:
        reach = ", ".join(f"{low:.1f}..{high:.1f}" for low, high in ends)
        raise ValueError(f"these runs have no noise level in common: their log-SNR is {reach}")
    return torch.linspace(low, high, num, dtype=torch.float64)


def _reach(process: Process) -> tuple[float, float]:
    """Least and largest log-SNR."""
    last = (process.schedule.num_timesteps or 2) - 1
    dtype = torch.int64 if process.discrete else torch.float64
    high, low = process.logsnr(torch.tensor([0, last], dtype=dtype, device=process.rule_mean.device)).tolist()
    return low, high


@torch.no_grad()
def levels_of(process: Process, logsnr: Tensor) -> Levels:
    """The process's times nearest to these log-SNR; on a discrete schedule each once, so there may be fewer."""
    time = process.schedule.t_from_logsnr(logsnr.to(process.rule_mean.device))
    if process.discrete:
        time = torch.unique(time).flip(0)
    coef = Coefficients(*(value.cpu() for value in process.coefficients(time, dtype=torch.float64)))
    return Levels(time, coef.logsnr, coef)


class Images(NamedTuple):
    """Some of a data set, on the CPU."""

    x: Tensor
    y: Tensor
    moments_scale: float | None

    def part(self, start: int, stop: int, device: torch.device) -> tuple[Tensor | Moments, Tensor]:
        """Images start .. stop-1 on a device, as the ops take them, and their labels."""
        x, y = self.x[start:stop].to(device), self.y[start:stop].to(device)
        return (x if self.moments_scale is None else Moments(x, self.moments_scale)), y


def draw_images(dataset: Dataset, num: int, seed: int, first: int = 0) -> Images:
    """`num` images of an order that the seed decides, from place `first` on; where they end, it begins again."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    batch = dataset.gather(order[(first + torch.arange(num)) % len(dataset)])
    return Images(batch.x, batch.y, batch.moments_scale)
