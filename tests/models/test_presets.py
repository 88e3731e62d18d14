"""Looking up presets by name; their parameter counts are tested beside the operations."""

import pytest
import torch

from erdfast.models import DiT, DiTConfig, JiT, JiTConfig, LightningDiT, UViT, UViTConfig
from erdfast.presets import MODELS, build_model, model_config


def test_build_with_overrides():
    model = build_model("uvit_tiny", num_classes=0, conv=False)
    assert isinstance(model, UViT)
    assert model.num_classes == 0
    assert model.config == model_config("uvit_tiny", num_classes=0, conv=False)
    assert isinstance(model.final_layer, torch.nn.Identity)
    assert isinstance(build_model("dit_tiny"), DiT)
    assert isinstance(build_model("lightningdit_tiny", qk_norm=True), LightningDiT)
    assert isinstance(build_model("jit_tiny", context_length=2), JiT)
    assert MODELS["uvit_tiny"].num_classes == 10


def test_learn_sigma_doubles_the_channels():
    assert build_model("dit_tiny", learn_sigma=True).out_channels == 8


def test_unknown_names_say_what_is_near():
    with pytest.raises(ValueError, match=r"'dit_x2' \(did you mean 'dit_xl2'\?\); choose from uvit_s2, .*dit_tiny"):
        build_model("dit_x2")
    with pytest.raises(ValueError, match=r"uvit_s2 has no field 'num_clases' \(did you mean 'num_classes'\?\)"):
        model_config("uvit_s2", num_clases=3)
    with pytest.raises(ValueError, match="dit_b2 has no field 'conv'"):
        model_config("dit_b2", conv=True)


def test_head_widths_of_the_papers_networks():
    papers = [config for name, config in MODELS.items() if name.endswith("2")]
    assert {config.head_width for config in papers if isinstance(config, DiTConfig | UViTConfig)} == {64, 72}


def test_published_jits():
    jits = {name: config for name, config in MODELS.items() if isinstance(config, JiTConfig) and name != "jit_tiny"}
    assert len(jits) == 6
    for name, config in jits.items():
        assert (config.num_patches, config.context_tokens) == (256, 32)
        assert config.block_tokens == (256,) * config.context_start + (288,) * (config.depth - config.context_start)
        dropped = [i for i in range(config.depth) if config.block_dropout(i)]
        assert dropped == (list(range(8, 24)) if name.startswith("jit_h") else [])
