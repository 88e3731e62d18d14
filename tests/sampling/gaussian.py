"""A data distribution whose best network is known: each class a Gaussian of one width, no class another."""

import math

import torch
from torch import Tensor, nn

from erdfast.process import Process


class GaussianNetwork(nn.Module):
    """The Bayes-optimal network for x0 ~ N(mean of the class, std^2) under a process, for any target.

    Counts its calls, and remembers the batch size, time and dtype of each.
    """

    def __init__(
        self,
        process: Process,
        shape: tuple[int, int, int],
        num_classes: int = 3,
        std: float = 0.5,
        extra: int = 0,
    ) -> None:
        super().__init__()
        self.process = process
        self.input_shape = shape
        self.num_classes = num_classes
        self.std = std
        self.extra = extra
        generator = torch.Generator().manual_seed(5)
        self.means = nn.Parameter(torch.randn(num_classes + 1, *shape, generator=generator).double())
        self.calls: list[tuple[int, float, torch.dtype]] = []

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        self.calls.append((len(x), float(time[0]), x.dtype))
        schedule = self.process.schedule
        t = time.double()
        if schedule.discrete:
            t = (t * (schedule.num_timesteps or 0) / 1000).round().long()
        alpha, sigma, c_x, c_eps = (
            field[:, None, None, None] for field in self.process.coefficients(t, dtype=torch.float64)[:4]
        )
        mean = self.means[0] if y is None else self.means[y]
        residual = (x.double() - alpha * mean) / (alpha**2 * self.std**2 + sigma**2)
        prediction = c_x * (mean + alpha * self.std**2 * residual) + c_eps * sigma * residual
        return torch.cat([prediction, *[torch.full_like(prediction[:, :1], 1e6)] * self.extra], dim=1).float()

    def endpoint(self, x: Tensor, mean: Tensor, alpha: float, sigma: float) -> Tensor:
        """Where the exact probability flow takes x_t = x, known at (alpha, sigma), without noise."""
        return mean + self.std * (x - alpha * mean) / math.hypot(alpha * self.std, sigma)
