"""The tables behind the names on the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from erdfast.models import Backbone, BackboneConfig, DiTConfig, UViTConfig

# fmt: off
MODELS: dict[str, BackboneConfig] = {
    # Latents (4, 32, 32) of 256-pixel images, 1000 classes.                           parameters  GFLOP/image
    "uvit_s2":     UViTConfig(depth=13, width=512,  num_heads=8),                     #  44,772,516    73
    "uvit_m2":     UViTConfig(depth=17, width=768,  num_heads=12),                    # 130,891,940   211
    "uvit_l2":     UViTConfig(depth=21, width=1024, num_heads=16),                    # 286,763,172   459
    "uvit_h2":     UViTConfig(depth=29, width=1152, num_heads=16),                    # 500,832,164   799
    "dit_s2":      DiTConfig(depth=12,  width=384,  num_heads=6),                     #  32,957,200    36
    "dit_b2":      DiTConfig(depth=12,  width=768,  num_heads=12),                    # 130,500,112   138
    "dit_l2":      DiTConfig(depth=24,  width=1024, num_heads=16),                    # 458,086,416   484
    "dit_xl2":     DiTConfig(depth=28,  width=1152, num_heads=16),                    # 675,111,184   712
    # For a CPU: the 8x8 digits, and small latents for tests.
    "uvit_digits": UViTConfig(depth=5, width=128, num_heads=4, input_shape=(1, 8, 8), num_classes=10),
    "dit_digits":  DiTConfig(depth=6,  width=96,  num_heads=3, input_shape=(1, 8, 8), num_classes=10),
    "uvit_tiny":   UViTConfig(depth=3, width=64,  num_heads=2, input_shape=(4, 8, 8), num_classes=10),
    "dit_tiny":    DiTConfig(depth=3,  width=64,  num_heads=2, input_shape=(4, 8, 8), num_classes=10),
}
# fmt: on
"""Configuration by preset name, beside it parameters and operations (10^9, forward and backward).
Patches are 2x2; the U-ViTs end with the 3x3 convolution, as ERD's do."""


def model_config(name: str, **overrides: Any) -> BackboneConfig:
    """The configuration of a preset, with fields replaced: `model_config("dit_b2", num_classes=10)`.

    Raises:
        ValueError: an unknown name or field, or an impossible value.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}{_nearest(name, MODELS)}; choose from {', '.join(MODELS)}")
    fields = [field.name for field in dataclasses.fields(MODELS[name])]
    for key in overrides:
        if key not in fields:
            raise ValueError(
                f"{name} has no field {key!r}{_nearest(key, fields)}; it has {', '.join(fields)}"
            )
    return dataclasses.replace(MODELS[name], **overrides)


def build_model(name: str, **overrides: Any) -> Backbone:
    """The network of a preset with freshly drawn weights; arguments and errors as `model_config`."""
    return model_config(name, **overrides).build()


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
