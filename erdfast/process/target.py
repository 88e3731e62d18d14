"""What the network regresses on, y = c_x*x0 + c_eps*eps: fixed rules and learnable ones (k-Diff)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .coefficients import SPACES, Pair, Point


class TargetOptions(NamedTuple):
    """Settings of the learnable targets."""

    k_init: float
    """Every learnable number's start, strictly between 0 and 1."""
    k_bins: int
    """Linear pieces of `k(t)`, at least 1."""


class Target(nn.Module):
    """A rule for (c_x, c_eps). Both include the noise scale, and gradients reach the rule's parameters
    through them."""

    learnable: ClassVar[bool]

    @abstractmethod
    def forward(self, point: Point) -> Pair:
        """(B,) float64 each."""

    def values(self) -> dict[str, Tensor]:
        """The learnt numbers now, detached and on their device, for a log; empty for a fixed target."""
        return {}


class FixedTarget(Target):
    """One of SPACES."""

    learnable = False

    def __init__(self, rule: Callable[[Point], Pair], options: TargetOptions) -> None:
        del options
        super().__init__()
        self.rule = rule

    def forward(self, point: Point) -> Pair:
        return self.rule(point)


def raw_parameter(shape: tuple[int, ...], k_init: float) -> nn.Parameter:
    """A parameter whose sigmoid is k_init."""
    return nn.Parameter(torch.full(shape, math.log(k_init) - math.log1p(-k_init)))


class LearnableK(Target):
    """k*x0 - (1-k)*noise, k = sigmoid(w_k) (k-Diff, sec. 4): eps, v, x0 prediction at k = 0, 0.5, 1."""

    learnable = True

    def __init__(self, options: TargetOptions) -> None:
        super().__init__()
        self.w_k = raw_parameter((), options.k_init)

    def k(self, unit_time: Tensor) -> Tensor:
        """k at these times: float64, in (0, 1)."""
        return torch.sigmoid(self.w_k.to(torch.float64)).expand_as(unit_time)

    def forward(self, point: Point) -> Pair:
        k = self.k(point.unit_time)
        return k, -(1.0 - k) * point.noise_scale

    def values(self) -> dict[str, Tensor]:
        return {"k": torch.sigmoid(self.w_k.detach())}


class LearnableKOfTime(LearnableK):
    """k piecewise linear in time, a sigmoid at each bin's end point (k-Diff, appendix E)."""

    def __init__(self, options: TargetOptions) -> None:
        Target.__init__(self)
        self.bins = options.k_bins
        self.w_k = raw_parameter((options.k_bins + 1,), options.k_init)

    def k(self, unit_time: Tensor) -> Tensor:
        ends = torch.sigmoid(self.w_k.to(torch.float64))
        place = unit_time * self.bins
        left = place.detach().floor().clamp(0, self.bins - 1)
        index = left.to(torch.int64)
        return torch.lerp(ends[index], ends[index + 1], place - left)

    def values(self) -> dict[str, Tensor]:
        """k at the ends of the bins, from clean to noise; and its range, for logs that take single numbers alone."""
        k = torch.sigmoid(self.w_k.detach())
        return {"k": k, "k_min": k.min(), "k_max": k.max()}


class TwoLearnableK(Target):
    """k0*x0 - k1*noise with two independent numbers in (0, 1) (k-Diff, appendix E).

    Its error must be measured in a fixed space (`loss_space`): in the target's own, k0 = k1 = 0 has the least loss.
    """

    learnable = True

    def __init__(self, options: TargetOptions) -> None:
        super().__init__()
        self.w_k = raw_parameter((2,), options.k_init)

    def forward(self, point: Point) -> Pair:
        k = torch.sigmoid(self.w_k.to(torch.float64))
        return k[0].expand_as(point.alpha), -k[1].expand_as(point.alpha) * point.noise_scale

    def values(self) -> dict[str, Tensor]:
        k = torch.sigmoid(self.w_k.detach())
        return {"k0": k[0], "k1": k[1]}


TARGETS: dict[str, Callable[[TargetOptions], Target]] = {
    **{name: partial(FixedTarget, rule) for name, rule in SPACES.items()},
    "k": LearnableK,
    "k2": TwoLearnableK,
    "k(t)": LearnableKOfTime,
}
"""Every target by name; each is made with TargetOptions."""
