import itertools
import math

import pytest
import torch
from torch import nn

from erdfast.config import EmaConfig, OptimizerConfig
from erdfast.ops.optimizer import AdamWEma
from erdfast.training.ema import Ema
from erdfast.training.optimizer import build_optimizer, learning_rate


def test_warm_up_then_constant():
    config = OptimizerConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(OptimizerConfig(lr=2.0), 0, 100) == 2.0


def test_cosine_falls_from_the_end_of_the_warm_up_to_zero():
    config = OptimizerConfig(lr=2.0, warmup_steps=10, lr_schedule="cosine")
    rates = [learning_rate(config, step, 110) for step in range(111)]
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(1 + math.sqrt(0.5))
    assert rates[110] == 0.0
    assert all(0 < later < earlier for earlier, later in itertools.pairwise(rates[10:-1]))


@pytest.mark.parametrize("warmup", [0, 5, 50])
def test_rates_are_always_finite_and_positive_before_the_end(warmup):
    config = OptimizerConfig(lr=1.0, warmup_steps=warmup, lr_schedule="cosine")
    assert all(0 < learning_rate(config, step, 5) <= 1 for step in range(5))
    assert learning_rate(config, 7, 5) >= 0  # beyond the end


def fresh(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> AdamWEma:
    return build_optimizer(parameters, config, Ema(parameters, EmaConfig()))


def quadratic(parameters, target):
    errors = [((p - t) ** 2).sum() for p, t in zip(parameters.values(), target, strict=True)]
    return torch.stack(errors).sum()


def test_steps_are_those_of_adamw_in_float64():
    torch.manual_seed(0)
    config = OptimizerConfig(lr=0.05, betas=(0.8, 0.95), adam_eps=1e-6, weight_decay=0.1)
    parameters = {"a": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(5))}
    target = [torch.randn(3, 4), torch.randn(5)]
    reference = {name: value.detach().double() for name, value in parameters.items()}
    first = {name: torch.zeros_like(value) for name, value in reference.items()}
    second = {name: torch.zeros_like(value) for name, value in reference.items()}
    optimizer = fresh(parameters, config)
    for step in range(1, 21):
        optimizer.zero_grad()
        quadratic(parameters, target).backward()
        optimizer.step()
        for (name, value), goal in zip(reference.items(), target, strict=True):
            gradient = 2 * (value - goal.double())
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            update = first[name] / (1 - 0.8**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-6)
            reference[name] = value * (1 - 0.05 * 0.1) - 0.05 * update
    for name, value in parameters.items():
        torch.testing.assert_close(value.detach().double(), reference[name], rtol=1e-4, atol=1e-4)


def test_the_state_is_there_before_the_first_step():
    parameters = {"a": nn.Parameter(torch.randn(3)), "b": nn.Parameter(torch.randn(2, 2))}
    optimizer = fresh(parameters, OptimizerConfig(lr=0.1))
    assert {key: tuple(value.shape) for key, value in optimizer.state[parameters["b"]].items()} == {
        "step": (),
        "exp_avg": (2, 2),
        "exp_avg_sq": (2, 2),
    }
    assert not any(bool(value.any()) for state in optimizer.state.values() for value in state.values())
    assert not any(value.requires_grad for state in optimizer.state.values() for value in state.values())


def test_goes_on_from_the_state_of_torchs_own_adamw():
    """As checkpoints hold it that were written when this was the optimiser."""
    config = OptimizerConfig(lr=0.1, weight_decay=0.1)
    target = [torch.randn(3), torch.randn(2)]
    parameters = {"block.a": nn.Parameter(torch.randn(3)), "b": nn.Parameter(torch.randn(2))}
    theirs = torch.optim.AdamW(list(parameters.values()), lr=0.1, weight_decay=0.1, fused=True)
    for _ in range(3):
        theirs.zero_grad()
        quadratic(parameters, target).backward()
        theirs.step()
    again = {name: nn.Parameter(value.detach().clone()) for name, value in parameters.items()}
    ours = fresh(again, config)
    for name, parameter in again.items():
        for key, value in theirs.state[parameters[name]].items():
            ours.state[parameter][key].copy_(value)
    for optimizer, values in ((theirs, parameters), (ours, again)):
        for _ in range(3):
            optimizer.zero_grad()
            quadratic(values, target).backward()
            optimizer.step()
    for name, value in parameters.items():
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-6)


def test_averages_move_with_the_parameters():
    parameters = {"a": nn.Parameter(torch.zeros(3))}
    ema = Ema(parameters, EmaConfig(ema_decay=(0.75,)))
    optimizer = build_optimizer(parameters, OptimizerConfig(lr=1.0), ema)
    parameters["a"].grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(parameters["a"].detach(), -torch.ones(3))
    torch.testing.assert_close(ema.averages[0][0], torch.full((3,), -0.25))
