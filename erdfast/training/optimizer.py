"""AdamW and averages of named parameters, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from erdfast.config import OptimizerConfig
from erdfast.ops.optimizer import AdamWEma

from .ema import Ema


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then constant or a cosine that reaches 0 at `total_steps`."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.lr_schedule == "constant":
        return config.lr * warmup
    span = max(total_steps - config.warmup_steps, 1)
    progress = min(max(step - config.warmup_steps, 0) / span, 1.0)
    return config.lr * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, ema: Ema) -> AdamWEma:
    """AdamW in the order of `parameters`; it also moves their averages, in the same pass over memory.

    AdamW's state, which otherwise appears with the first gradient, is there at once: a checkpoint fills it.
    """
    optimizer = AdamWEma(
        list(parameters.values()),
        lr=config.lr,
        betas=config.betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        emas=list(zip(ema.averages, ema.decays(0), strict=True)),
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format).detach(),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format).detach(),
        }
    return optimizer
