import pytest
import torch
from torch import nn

from erdfast.config import OptimizerConfig
from erdfast.presets import build_model
from erdfast.training.ema import Ema
from erdfast.training.optimizer import build_optimizer


def small() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module.get_parameter("2.weight").requires_grad_(False)
    return module


def averaging(module: nn.Module, decay: float):
    """(averages, optimiser that moves them)."""
    ema = Ema(module)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return ema, build_optimizer(trained, OptimizerConfig(lr=0.1, ema_decay=decay), ema.averages)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_against_float64(decay):
    module = small()
    ema, optimizer = averaging(module, decay)
    expected = {name: value.detach().double() for name, value in module.named_parameters()}
    for _ in range(50):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        for name, value in module.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach().double()
    for name, average in ema.module.named_parameters():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_averages_are_a_copy_that_is_not_trained():
    module = small()
    ema, optimizer = averaging(module, 0.5)
    assert not ema.module.training
    assert module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    with torch.no_grad():
        module.get_parameter("0.weight").add_(1.0)
    assert not torch.equal(module.get_parameter("0.weight"), ema.module.get_parameter("0.weight"))
    optimizer.step()  # without gradients parameters stay where they are, and averages follow
    torch.testing.assert_close(module.get_parameter("0.weight") - 0.5, ema.module.get_parameter("0.weight"))


def test_what_is_not_trained_stays_equal():
    model = build_model("dit_tiny")
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert fixed  # the position table
    ema, optimizer = averaging(model, 0.9)
    assert len(ema.averages) == len(list(model.parameters())) - len(fixed)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name in fixed:
        assert torch.equal(ema.module.get_parameter(name), model.get_parameter(name))
