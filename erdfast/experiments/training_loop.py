"""The training of one cell: the package's ops, optimiser and averages in a plain loop of one process.

What the trainer does around them (data at speed, checkpoints, several processes) small cells do not need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from erdfast.config import EmaConfig, OptimizerConfig
from erdfast.ops import NoiseKey, add_noise, diffusion_loss
from erdfast.process import Process
from erdfast.training.ema import Ema
from erdfast.training.optimizer import build_optimizer, set_learning_rates


class Examples(NamedTuple):
    """What one step learns from."""

    x0: Tensor
    """(B, ...) float32."""
    time: Tensor
    """(B,) as the process draws it."""
    labels: Tensor | None = None
    """(B,) int64, or None for a network without classes."""


def train(
    network: nn.Module,
    process: Process,
    examples: Callable[[int], Examples],
    *,
    steps: int,
    seed: int,
    optimizer: OptimizerConfig,
    ema_decay: float,
    after_step: Callable[[int, Callable[[], None]], None] | None = None,
) -> None:
    """Train both in place; they end as their averages.

    Args:
        network: called with (x_t, time) or (x_t, time, labels).
        process: trained too where its target is learnable and requires gradients.
        examples: what step 0, 1, ... learns from.
        steps: of the optimiser.
        seed: of the noise.
        optimizer: rates and schedule.
        ema_decay: of the averages.
        after_step: called with the number of steps done and a function that exchanges the weights with their averages:
            called twice, all is as before.
    """
    named = {f"model.{name}": p for name, p in network.named_parameters() if p.requires_grad}
    named |= {f"process.{name}": p for name, p in process.named_parameters() if p.requires_grad}
    ema = Ema(named, EmaConfig(ema_decay=(ema_decay,)))
    adam = build_optimizer(named, optimizer, ema)

    @torch.no_grad()
    def exchange() -> None:
        for parameter, average in zip(named.values(), ema.averages[0], strict=True):
            own = parameter.clone()
            parameter.copy_(average)
            average.copy_(own)

    for step in range(steps):
        set_learning_rates(adam, optimizer, step, steps)
        batch = examples(step)
        coef = process.coefficients(batch.time)
        key = NoiseKey(seed, step)
        inputs = (add_noise(batch.x0, coef, key), coef.time, *(() if batch.labels is None else (batch.labels,)))
        loss = diffusion_loss(network(*inputs), batch.x0, coef, key)
        adam.zero_grad()
        loss.backward()
        adam.step()
        if after_step is not None:
            after_step(step + 1, exchange)
    exchange()
