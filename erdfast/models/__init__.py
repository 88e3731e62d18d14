"""Backbones: `model(x, time, y)` from a configuration's `build()`; presets by name: `erdfast.presets`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from erdfast.models.adm_unet import ADMUNet, ADMUNetConfig
from erdfast.models.backbone import Backbone, BackboneConfig, TransformerConfig
from erdfast.models.diffusers_dit import (
    DiffusersDiT,
    DiffusersDiTConfig,
    from_diffusers,
    save_diffusers,
    to_diffusers,
    use_published_frequencies,
)
from erdfast.models.dit import DiT, DiTConfig
from erdfast.models.flops import forward_flops, parameter_count, training_flops, training_memory_bytes
from erdfast.models.jit import JiT, JiTConfig
from erdfast.models.lightningdit import LightningDiT, LightningDiTConfig
from erdfast.models.published import Published, load_published, load_weights
from erdfast.models.uvit import UViT, UViTConfig

BACKBONES: dict[str, type[BackboneConfig]] = {"dit": DiTConfig, "uvit": UViTConfig}
"""Configuration class by the name that `describe()` writes."""
BACKBONES |= {kind.backbone: kind for kind in (LightningDiTConfig, JiTConfig, ADMUNetConfig, DiffusersDiTConfig)}


def config_from_dict(description: Mapping[str, Any]) -> BackboneConfig:
    """The configuration that `BackboneConfig.describe` described, also after a round trip through JSON.

    Raises:
        ValueError: an unknown backbone or field, a missing field, or an impossible value.
    """
    values = dict(description)
    name = values.pop("backbone", None)
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; choose from {', '.join(BACKBONES)}")
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(BACKBONES[name])}
    unknown = [key for key in values if key not in fields]
    missing = [key for key, required in fields.items() if required and key not in values]
    if unknown or missing:
        raise ValueError(
            f"a {name} configuration has the fields {', '.join(fields)}; unknown {unknown}, missing {missing}"
        )
    return BACKBONES[name](**values)


__all__ = [
    "BACKBONES",
    "ADMUNet",
    "ADMUNetConfig",
    "Backbone",
    "BackboneConfig",
    "DiT",
    "DiTConfig",
    "DiffusersDiT",
    "DiffusersDiTConfig",
    "JiT",
    "JiTConfig",
    "LightningDiT",
    "LightningDiTConfig",
    "Published",
    "TransformerConfig",
    "UViT",
    "UViTConfig",
    "config_from_dict",
    "forward_flops",
    "from_diffusers",
    "load_published",
    "load_weights",
    "parameter_count",
    "save_diffusers",
    "to_diffusers",
    "training_flops",
    "training_memory_bytes",
    "use_published_frequencies",
]
