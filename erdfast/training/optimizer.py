"""AdamW and averages of named parameters, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from erdfast.config import OptimizerConfig
from erdfast.ops.optimizer import AdamWEma

from .ema import Ema
from .state import PROCESS

BASE_LR = "base_lr"
"""What a parameter group calls its learning rate before warm-up and schedule."""


def learning_rate(config: OptimizerConfig, step: int, total_steps: int, base: float | None = None) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then constant or a cosine that reaches 0 at `total_steps`.

    Args:
        base: what both act on; by default the network's, `config.lr`.
    """
    base = config.lr if base is None else base
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.lr_schedule == "constant":
        return base * warmup
    span = max(total_steps - config.warmup_steps, 1)
    progress = min(max(step - config.warmup_steps, 0) / span, 1.0)
    return base * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: AdamWEma, config: OptimizerConfig, step: int, total_steps: int) -> None:
    """Every group's for `step`: the network's and a learnable target's follow one schedule."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, total_steps, group[BASE_LR])


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, ema: Ema) -> AdamWEma:
    """AdamW in the order of `parameters`; it also moves their averages, in the same pass over memory.

    A learnable target (names in "process.", after all others) is a group of its own: its rate is `k_lr`, and it never
    decays, which would draw k to 0.5. k-Diff trains it with the network's rate (alg. 1, table 4: one Adam, 2e-4, no
    decay, no clipping of its own); under AdamW a rate moves w_k by no more than itself per step, so that a short run
    wants a larger one. AdamW's state, which otherwise appears with the first gradient, is there at once: a checkpoint
    fills it.
    """
    optimizer = AdamWEma(
        _groups(parameters, config),
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


def _groups(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    target = [name.startswith(PROCESS) for name in parameters]
    assert target == sorted(target), "averages are in the order of the groups"
    network = [p for name, p in parameters.items() if not name.startswith(PROCESS)]
    learnt = [p for name, p in parameters.items() if name.startswith(PROCESS)]
    rate = config.lr if config.k_lr is None else config.k_lr
    groups = [
        {"params": network, BASE_LR: config.lr},
        {"params": learnt, BASE_LR: rate, "lr": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
