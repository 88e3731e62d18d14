"""AdamW and averages in float64, written from the papers' formulas: what every implementation is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Adamw64:
    """The state of a list of parameters; steps have the semantics of `erdfast.ops.adamw_ema`."""

    def __init__(self, params: Sequence[Tensor], decays: Sequence[float] = ()) -> None:
        self.params = [param.detach().cpu().double().clone() for param in params]
        self.first = [torch.zeros_like(param) for param in self.params]
        self.second = [torch.zeros_like(param) for param in self.params]
        self.count = [0] * len(self.params)
        self.decays = decays
        self.emas = [list(self.params) for _ in decays]

    def step(
        self,
        grads: Sequence[Tensor | None],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        grad_scale: float = 1.0,
        found_inf: bool = False,
        max_norm: float = float("inf"),
    ) -> float:
        """Returns the norm of the unscaled gradients."""
        scaled = [None if grad is None else grad.detach().cpu().double() / grad_scale for grad in grads]
        norm = sum(float(grad.square().sum()) for grad in scaled if grad is not None) ** 0.5
        factor = min(1.0, max_norm / (norm + 1e-6))
        for t, grad in enumerate(scaled):
            if grad is not None and not found_inf:
                self.count[t] += 1
                self.first[t] = betas[0] * self.first[t] + (1 - betas[0]) * factor * grad
                self.second[t] = betas[1] * self.second[t] + (1 - betas[1]) * (factor * grad) ** 2
                mean = self.first[t] / (1 - betas[0] ** self.count[t])
                square = self.second[t] / (1 - betas[1] ** self.count[t])
                self.params[t] = (1 - lr * weight_decay) * self.params[t] - lr * mean / (square.sqrt() + eps)
        for emas, decay in zip(self.emas, self.decays, strict=True):
            emas[:] = [decay * ema + (1 - decay) * param for ema, param in zip(emas, self.params, strict=True)]
        return norm


def worst(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest absolute difference; infinite where one is not a number."""
    differences = [
        (a.detach().cpu().double() - b.detach().cpu().double()).abs().nan_to_num(float("inf")).max()
        for a, b in zip(actual, expected, strict=True)
        if a.numel()
    ]
    return float(max(differences))
