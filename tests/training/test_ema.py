import pytest
import torch
from torch import nn

from erdfast.presets import build_model
from erdfast.training.ema import Ema


def small() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module.get_parameter("2.weight").requires_grad_(False)
    return module


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_against_float64(decay):
    torch.manual_seed(0)
    module = small()
    ema = Ema(module, decay)
    expected = {name: value.detach().double() for name, value in module.named_parameters()}
    for _ in range(50):
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        ema.update()
        for name, value in module.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach().double()
    for name, average in ema.module.named_parameters():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_averages_are_a_copy_that_is_not_trained():
    module = small()
    ema = Ema(module, 0.5)
    assert not ema.module.training
    assert module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    with torch.no_grad():
        module.get_parameter("0.weight").add_(1.0)
    assert not torch.equal(module.get_parameter("0.weight"), ema.module.get_parameter("0.weight"))
    ema.update()
    torch.testing.assert_close(module.get_parameter("0.weight") - 0.5, ema.module.get_parameter("0.weight"))


def test_what_is_not_trained_stays_equal():
    model = build_model("dit_tiny")
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert fixed  # the position table
    ema = Ema(model, 0.9)
    ema.update()
    for name in fixed:
        assert torch.equal(ema.module.get_parameter(name), model.get_parameter(name))
