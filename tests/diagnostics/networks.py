"""Networks whose losses, features and gradients are known, as subjects of a diagnosis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from erdfast.data import Dataset, GaussianMixture
from erdfast.diagnostics.subject import Subject
from erdfast.models import Backbone, DiTConfig
from erdfast.process import Process
from erdfast.training.precision import resolve_precision

SHAPE = (2, 4, 4)


class Known(Backbone):
    """A network of one parameter, by which its answer is multiplied; its readout is told the answer as features.

    Args:
        num_classes: 0 for an unconditional one.
    """

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__(DiTConfig(width=4, depth=1, num_heads=1, input_shape=SHAPE, num_classes=num_classes))
        self.scale = nn.Parameter(torch.ones(()))
        self.out = nn.Identity()

    def answer(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        raise NotImplementedError

    def readout(self) -> nn.Module:
        return self.out

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        self.check_inputs(x, time, y)
        return self.scale * self.out(self.answer(x, time, y))


class Best(Known):
    """E[y | x_t] of a mixture, plus `off`."""

    def __init__(self, data: GaussianMixture, process: Process, *, knows_labels: bool = True, off: float = 0.0) -> None:
        super().__init__(data.num_classes if knows_labels else 0)
        self.data, self.process, self.off = data, process, off

    def answer(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        t = (time / (1000.0 / 1000)).round().long() if self.process.discrete else time.double()
        c = self.process.coefficients(t, torch.float64)
        return self.data.target_mean(x, c.alpha, c.sigma, c.c_x, c.c_eps, y).float() + self.off


class Zero(Known):
    """Says nothing."""

    def answer(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        return torch.zeros_like(x)


class Flat(Known):
    """x_t in its first `directions` elements, 0 in the others."""

    def __init__(self, directions: int) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(32) < directions).float().view(SHAPE), persistent=False)

    def answer(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        return x * self.get_buffer("mask")


def mixture(**options: Any) -> GaussianMixture:
    """Of three classes of two modes, 2x4x4."""
    return GaussianMixture(SHAPE, num_classes=3, modes_per_class=2, size=1000, **options)


def subject(model: Backbone, process: Process, data: Dataset | None = None, **options: Any) -> Subject:
    """In float32 on the CPU; by default on a mixture."""
    own: dict[str, Any] = {"name": "known", "step": 7, "data": "here"}
    precision = resolve_precision("fp32", torch.device("cpu"))
    return Subject(model=model.eval(), process=process, dataset=data or mixture(), precision=precision, **own | options)
