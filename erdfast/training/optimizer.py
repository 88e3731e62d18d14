"""AdamW and averages of named parameters, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from erdfast.config import OptimizerConfig
from erdfast.ops.optimizer import AdamWEma


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then constant or a cosine that reaches 0 at `total_steps`."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.lr_schedule == "constant":
        return config.lr * warmup
    span = max(total_steps - config.warmup_steps, 1)
    progress = min(max(step - config.warmup_steps, 0) / span, 1.0)
    return config.lr * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, averages: Sequence[Tensor] = ()
) -> AdamWEma:
    """AdamW in the order of `parameters`; it also moves their `averages` (see ema.py), in the same pass over memory."""
    return AdamWEma(
        list(parameters.values()),
        lr=config.lr,
        betas=config.betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        emas=[(averages, config.ema_decay)] if averages else (),
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors named `<parameter>/<moment>`; empty before the first step."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned."""
    for name, parameter in parameters.items():
        state = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.rpartition("/")[0] == name}
        if state:
            optimizer.state[parameter] = {
                # AdamW keeps its step counter as a 0-d float32 tensor, its moments like the parameter.
                key: value.to(parameter.device).clone()
                for key, value in state.items()
            }
