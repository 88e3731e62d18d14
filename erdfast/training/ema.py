"""Exponential moving average of all trainable weights: the weights that are sampled and published."""

from __future__ import annotations

import copy

from torch import Tensor, nn


class Ema:
    """A second module whose parameters follow those of the first: ema += (1 - decay) * (parameter - ema), in float32.

    The optimiser, which has the decay, moves them in its own pass over the parameters
    (erdfast.ops.optimizer.AdamWEma). Parameters that are not trained (position tables) and buffers are equal in both
    and stay so.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        self.averages: list[Tensor] = [average for average, parameter in pairs if parameter.requires_grad]
        """Of the trained parameters, in their order."""
