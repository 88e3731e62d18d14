"""The tables behind the names on the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from erdfast.models import ADMUNetConfig, Backbone, BackboneConfig, DiTConfig, UViTConfig

# fmt: off
_ADM_64: dict[str, Any] = {"input_shape": (3, 64, 64), "num_res_blocks": 3, "attention_resolutions": (2, 4, 8),
                           "new_attention_order": True}
_ADM_128: dict[str, Any] = {"input_shape": (3, 128, 128), "num_res_blocks": 2, "attention_resolutions": (4, 8, 16)}
_ADM_256: dict[str, Any] = {"input_shape": (3, 256, 256), "num_res_blocks": 2, "attention_resolutions": (8, 16, 32)}

MODELS: dict[str, BackboneConfig] = {
    # Latents (4, 32, 32) of 256-pixel images, 1000 classes.                           parameters  GFLOP/image
    "uvit_s2":     UViTConfig(depth=13, width=512,  num_heads=8),                     #  44,772,516    74
    "uvit_m2":     UViTConfig(depth=17, width=768,  num_heads=12),                    # 130,891,940   211
    "uvit_l2":     UViTConfig(depth=21, width=1024, num_heads=16),                    # 286,763,172   459
    "uvit_h2":     UViTConfig(depth=29, width=1152, num_heads=16),                    # 500,832,164   799
    "dit_s2":      DiTConfig(depth=12,  width=384,  num_heads=6),                     #  32,957,200    36
    "dit_b2":      DiTConfig(depth=12,  width=768,  num_heads=12),                    # 130,500,112   138
    "dit_l2":      DiTConfig(depth=24,  width=1024, num_heads=16),                    # 458,086,416   484
    "dit_xl2":     DiTConfig(depth=28,  width=1152, num_heads=16),                    # 675,111,184   712
    # ADM's UNets, by pixels, attention at 32x32, 16x16 and 8x8. CelebA: as ERD's authors had it (59M), no classes.
    "adm_unet_celeba64":   ADMUNetConfig(model_channels=128, channel_mult=(1, 2, 2, 2), num_heads=1, num_classes=0,
                                         **_ADM_64),                                  #  58,936,963   241
    "adm_unet_imagenet64": ADMUNetConfig(model_channels=192, channel_mult=(1, 2, 3, 4), num_head_channels=64,
                                         dropout=0.1, **_ADM_64),                     # 295,900,035   658
    "adm_unet_imagenet128": ADMUNetConfig(model_channels=256, channel_mult=(1, 1, 2, 3, 4), num_heads=4,
                                          **_ADM_128),                                # 421,523,715  1841
    "adm_unet_imagenet256": ADMUNetConfig(model_channels=256, channel_mult=(1, 1, 2, 2, 4, 4), num_head_channels=64,
                                          **_ADM_256),                                # 553,832,195  6716
    # The sizes of LDM's network on (4, 32, 32) latents, with ADM's blocks, as ERD's authors had it.
    "adm_unet_ldm":        ADMUNetConfig(model_channels=256, channel_mult=(1, 2, 4), num_res_blocks=2,
                                         attention_resolutions=(1, 2, 4), num_head_channels=32,
                                         new_attention_order=True),                   # 289,521,668   270
    # For a CPU: the 8x8 digits, and small latents for tests.
    "uvit_digits": UViTConfig(depth=5, width=128, num_heads=4, input_shape=(1, 8, 8), num_classes=10),
    "dit_digits":  DiTConfig(depth=6,  width=96,  num_heads=3, input_shape=(1, 8, 8), num_classes=10),
    "uvit_tiny":   UViTConfig(depth=3, width=64,  num_heads=2, input_shape=(4, 8, 8), num_classes=10),
    "dit_tiny":    DiTConfig(depth=3,  width=64,  num_heads=2, input_shape=(4, 8, 8), num_classes=10),
    "adm_unet_tiny": ADMUNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,),
                                   num_head_channels=16, input_shape=(3, 16, 16), num_classes=10),
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
            raise ValueError(f"{name} has no field {key!r}{_nearest(key, fields)}; it has {', '.join(fields)}")
    return dataclasses.replace(MODELS[name], **overrides)


def build_model(name: str, **overrides: Any) -> Backbone:
    """The network of a preset with freshly drawn weights; arguments and errors as `model_config`."""
    return model_config(name, **overrides).build()


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# fmt: off
_ERD = {"schedule": "cosine", "target": "eps", "weighting": "erd", "batch_size": 256, "lr": 1e-4, "label_drop": 0.1,
        "ema_decay": (0.9999,), "steps": 400_000}
_DIT, _UVIT = _ERD | {"betas": (0.9, 0.999)}, _ERD | {"betas": (0.99, 0.99)}
_DIGITS = {"data": "digits", "schedule": "cosine", "target": "eps", "weighting": "erd", "batch_size": 128, "lr": 2e-3,
           "betas": (0.9, 0.99), "warmup_steps": 50, "lr_schedule": "cosine", "ema_decay": (0.99,), "steps": 1800,
           "stratified": True, "log_every": 25, "checkpoint_every": 600, "sample_every": 450, "sample_num": 80}
_TINY = {"data": "mixture", "batch_size": 16, "lr": 1e-3, "ema_decay": (0.99,), "steps": 200, "log_every": 10,
         "checkpoint_every": 100, "sample_every": 100}

RECIPES: dict[str, dict[str, Any]] = {
    # ERD on ImageNet 256 latents.                                     FID-50K at 400K steps, no guidance: plain -> ERD
    "erd_dit_s2":  _DIT | {"model": "dit_s2"},                       # 69.35 -> 57.54 with the trick ladder
    "erd_dit_b2":  _DIT | {"model": "dit_b2"},                       # 43.4 -> 32.3
    "erd_dit_l2":  _DIT | {"model": "dit_l2"},                       # 23.3 -> 17.2
    "erd_dit_xl2": _DIT | {"model": "dit_xl2"},                      # 19.5 -> 15.0
    "erd_uvit_s2": _UVIT | {"model": "uvit_s2"},
    "erd_uvit_m2": _UVIT | {"model": "uvit_m2"},                     # 27.7 -> 19.9
    "erd_uvit_l2": _UVIT | {"model": "uvit_l2"},                     # 20.4 -> 15.0
    "erd_uvit_h2": _UVIT | {"model": "uvit_h2"},                     # 13.7 (Min-SNR 11.7) -> 8.9
    # Embedded data on a CPU: Frechet distance and label accuracy are in README.
    "digits":      _DIGITS | {"model": "uvit_digits"},
    "digits_dit":  _DIGITS | {"model": "dit_digits"},
    "tiny_uvit":   _TINY | {"model": "uvit_tiny"},
    "tiny_dit":    _TINY | {"model": "dit_tiny"},
}
# fmt: on
"""Options by recipe name; what a recipe does not name has its default."""


def recipe(name: str) -> dict[str, Any]:
    """The options that a recipe sets, by field name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}{_nearest(name, RECIPES)}; choose from {', '.join(RECIPES)}")
    return dict(RECIPES[name])


def recipe_of_model(model: str) -> str:
    """The first recipe that trains `model`."""
    model_config(model)  # an unknown model is named, with the choices
    return next(name for name, options in RECIPES.items() if options["model"] == model)
