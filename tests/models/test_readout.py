"""Every backbone says where the features of an image are to be seen."""

import pytest
import torch

from erdfast.models import BACKBONES, DiffusersDiTConfig
from erdfast.models.backbone import Backbone
from erdfast.presets import MODELS

CONFIGS = {config.backbone: config for name, config in MODELS.items() if name.endswith("_tiny")}
CONFIGS["diffusers_dit"] = DiffusersDiTConfig(width=64, depth=2, num_heads=4, input_shape=(4, 8, 8), num_classes=10)
FEATURES = {"adm_unet": (32, 16, 16)}
"""Of one image, where they are not 16 tokens of width 64."""


def network(name: str) -> Backbone:
    torch.manual_seed(0)
    model = CONFIGS[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def test_all_backbones_are_looked_at():
    assert CONFIGS.keys() == BACKBONES.keys()


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_prediction_follows_from_its_features_alone(name):
    """Features of the patches, without other tokens: exchanged between images, the predictions are exchanged."""
    model = network(name)
    x = torch.randn(3, *model.input_shape)
    time, y = torch.full((3,), 0.4), torch.full((3,), 2)
    before = model(x, time, y)
    seen = []

    def exchange(module, inputs):
        seen.append(inputs[0])
        return (inputs[0].flip(0), *inputs[1:])

    hook = model.readout().register_forward_pre_hook(exchange)
    after = model(x, time, y)
    hook.remove()
    assert [tuple(f.shape) for f in seen] == [(3, *FEATURES.get(name, (16, 64)))]
    torch.testing.assert_close(after, before.flip(0), rtol=1e-5, atol=1e-5)
    assert (before - before.flip(0)).abs().max() > 1e-3
    torch.testing.assert_close(model(x, time, y), before, rtol=0, atol=0)
