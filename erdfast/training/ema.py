"""Exponential moving averages of the trained weights: what is sampled and published.

average += (1 - decay) * (parameter - average)

constant    decay
warm-up     min(decay, (1 + step)/(10 + step))
power       (1 - 1/t)^(gamma + 1), t = step + 1: the profile t^gamma, whose width grows with training
            (Karras et al. 2024, EDM2, sec. 3.1); gamma from the profile's relative standard deviation
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from erdfast.config import EmaConfig

from .power import gamma_of_std


def average_names(config: EmaConfig) -> list[str]:
    """Under which averages are saved: short where that tells them apart, such as "0.9999" or "std0.050"."""
    values, prefix = (config.ema_std, "std") if config.ema_std else (config.ema_decay, "")
    short = [f"{prefix}{value:{'.3f' if prefix else 'g'}}" for value in values]
    return short if len({*short}) == len(short) else [f"{prefix}{value!r}" for value in values]


class Ema:
    """Float32 averages beside the parameters, sharded alike. The optimiser moves them in its own pass over memory.

    Args:
        parameters: those that are trained, by name.
        config: which averages.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: EmaConfig) -> None:
        self.config, self._parameter_names = config, list(parameters)
        self._gammas = [gamma_of_std(std) for std in config.ema_std]
        self.names = average_names(config)
        self.averages: list[list[Tensor]] = [
            [parameter.detach().clone() for parameter in parameters.values()] for _ in self.names
        ]
        """By average, in the order of the parameters."""

    @property
    def primary(self) -> int:
        """The number of the average that is sampled and published."""
        return len(self.names) - 1

    def decays(self, step: int) -> list[float]:
        """Of each average at this step, from 0."""
        if self._gammas:
            return [(1 - 1 / (step + 1)) ** (gamma + 1) for gamma in self._gammas]
        if self.config.ema_warmup:
            return [min(decay, (1 + step) / (10 + step)) for decay in self.config.ema_decay]
        return list(self.config.ema_decay)

    def tensors(self) -> dict[str, Tensor]:
        """All averages as "<average>/<parameter>", the tensors themselves."""
        return {
            f"{name}/{parameter}": tensor
            for name, tensors in zip(self.names, self.averages, strict=True)
            for parameter, tensor in zip(self._parameter_names, tensors, strict=True)
        }

    @torch.no_grad()
    def snapshot(self, number: int) -> dict[str, Tensor]:
        """One average by parameter."""
        return dict(zip(self._parameter_names, self.averages[number], strict=True))
