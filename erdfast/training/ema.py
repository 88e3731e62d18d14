"""Exponential moving average of all trainable weights: the weights that are sampled and published."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """A second module whose parameters follow those of the first: ema += (1 - decay) * (parameter - ema), in float32.

    Parameters that are not trained (position tables) and buffers are equal in both and stay so.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        pairs = [
            (average, parameter)
            for average, parameter in zip(self.module.parameters(), module.parameters(), strict=True)
            if parameter.requires_grad
        ]
        self._averages: list[torch.Tensor] = [average for average, _ in pairs]
        self._parameters: list[torch.Tensor] = [parameter for _, parameter in pairs]

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average; two kernels for all parameters together."""
        torch._foreach_lerp_(self._averages, self._parameters, 1.0 - self.decay)  # pyright: ignore[reportPrivateImportUsage]  # as torch.optim does
