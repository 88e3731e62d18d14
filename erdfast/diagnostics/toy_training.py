"""The toy's network and how it is trained (ERD, appendix F.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from erdfast.models.layers import TimeFeatures
from erdfast.ops import NoiseKey, add_noise, diffusion_loss
from erdfast.process import Coefficients

from .toy_data import Task, toy_mixture

WIDTH = 256
TIME_FEATURES = 64
LEARNING_RATE = 1e-3
DRAWN_TOGETHER = 100
"""Steps whose samples and times are drawn in one go: one by one they would take a sixth of the training."""


class ToyNetwork(nn.Module):
    """Three hidden layers of 256 SiLU units on (x_t, 64 sines and cosines of the time), and a linear readout.

    Args:
        time_scale: factor of the time in [0, 1] before its sines, of which the fastest has frequency 1. The paper has
            none; diffusion transformers have 1000.
        width: of the hidden layers.
    """

    def __init__(self, time_scale: float = 1.0, width: int = WIDTH) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.time_features = TimeFeatures(TIME_FEATURES)
        sizes = (2 + TIME_FEATURES, width, width)
        layers = [part for size in sizes for part in (nn.Linear(size, width), nn.SiLU())]
        self.layers = nn.Sequential(*layers)
        self.readout = nn.Linear(width, 2)

    def hidden(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, 2, 1, 1) and (B,) => (B, width), what the readout sees."""
        return self.layers(torch.cat([x.flatten(1), self.time_features(self.time_scale * time)], dim=1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, 2, 1, 1) and (B,) => like x."""
        return self.readout(self.hidden(x, time)).view_as(x)


class ToyTraining:
    """Adam on fresh samples, plain squared error, times uniform in an interval.

    Samples, noise and (up to the interval) times are the same for every task and network.

    Args:
        network: trained in place.
        interval: of the times.
        seed: of samples, noise and times.
    """

    def __init__(
        self, network: nn.Module, task: Task, *, batch: int, seed: int, interval: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        self.network, self.task, self.batch, self.seed, self.interval = network, task, batch, seed, interval
        self.data = toy_mixture(seed)
        self.optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, fused=True)
        self.step = 0

    def run(self, until: int) -> None:
        """Train on to this number of iterations from the start."""
        while self.step < until:
            steps = min(DRAWN_TOGETHER, until - self.step)
            for x0, coefficients in zip(*self._draw(steps), strict=True):
                self._update(x0, coefficients)

    def _draw(self, steps: int) -> tuple[Tensor, list[Coefficients]]:
        """(steps, B, 2, 1, 1) samples and the coefficients of as many batches."""
        first, low, high = self.step * self.batch, *self.interval
        x0, _, _ = self.data.gather(torch.arange(first, first + steps * self.batch))
        share = self.task.process.sample_time(steps * self.batch, seed=self.seed, step=0, rank_offset=first)
        found = self.task.coefficients(low + (high - low) * share)
        batches = zip(*(part.split(self.batch) for part in found), strict=True)
        return x0.unflatten(0, (steps, self.batch)), [Coefficients(*batch) for batch in batches]

    def _update(self, x0: Tensor, coefficients: Coefficients) -> None:
        key = NoiseKey(self.seed, self.step)
        pred = self.network(add_noise(x0, coefficients, key), coefficients.time)
        loss = diffusion_loss(pred, x0, coefficients, key)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
