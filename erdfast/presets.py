"""The networks behind the names on the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from erdfast.models import ADMUNetConfig, Backbone, BackboneConfig, DiTConfig, JiTConfig, LightningDiTConfig, UViTConfig

_LATENTS_2: dict[str, Any] = {"patch_size": 2, "input_shape": (4, 32, 32)}
_PIXELS_32: dict[str, Any] = {"patch_size": 32, "input_shape": (3, 512, 512)}
_JIT_H: dict[str, Any] = {"context_start": 10, "bottleneck": 256, "dropout": 0.2}
_ADM_64: dict[str, Any] = {
    "input_shape": (3, 64, 64),
    "num_res_blocks": 3,
    "attention_resolutions": (2, 4, 8),
    "new_attention_order": True,
}
_ADM_128: dict[str, Any] = {"input_shape": (3, 128, 128), "num_res_blocks": 2, "attention_resolutions": (4, 8, 16)}
_ADM_256: dict[str, Any] = {"input_shape": (3, 256, 256), "num_res_blocks": 2, "attention_resolutions": (8, 16, 32)}

# fmt: off
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
    # VA-VAE latents (32, 16, 16), or the above in patches of 2x2.
    "lightningdit_b1":   LightningDiTConfig(depth=12, width=768,  num_heads=12),      #   130,556,192  138
    "lightningdit_xl1":  LightningDiTConfig(depth=28, width=1152, num_heads=16),      #   675,256,736  712
    "lightningdit_1p0b": LightningDiTConfig(depth=24, width=1536, num_heads=24),      # 1,029,401,120 1075
    "lightningdit_1p6b": LightningDiTConfig(depth=28, width=1792, num_heads=28),      # 1,631,767,120 1700
    "lightningdit_b2":   LightningDiTConfig(depth=12, width=768,  num_heads=12, **_LATENTS_2),  # 130,531,600 138
    "lightningdit_l2":   LightningDiTConfig(depth=24, width=1024, num_heads=16, **_LATENTS_2),  # 458,120,176 484
    "lightningdit_xl2":  LightningDiTConfig(depth=28, width=1152, num_heads=16, **_LATENTS_2),  # 675,219,856 712
    # Pixels: 16x16 patches of (3, 256, 256), 32x32 patches of (3, 512, 512).
    "jit_b16": JiTConfig(depth=12, width=768,  num_heads=12, context_start=4),              # 131,320,320  151
    "jit_l16": JiTConfig(depth=24, width=1024, num_heads=16, context_start=8),              # 459,139,808  528
    "jit_h16": JiTConfig(depth=32, width=1280, num_heads=16, **_JIT_H),                     # 952,842,048 1092
    "jit_b32": JiTConfig(depth=12, width=768,  num_heads=12, context_start=4, **_PIXELS_32),  # 133,387,008  155
    "jit_l32": JiTConfig(depth=24, width=1024, num_heads=16, context_start=8, **_PIXELS_32),  # 461,796,320  532
    "jit_h32": JiTConfig(depth=32, width=1280, num_heads=16, **_JIT_H, **_PIXELS_32),         # 956,383,296 1097
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
    # Pixels (3, 64, 64) without classes.
    "dit_s4_celeba64": DiTConfig(depth=12, width=384, num_heads=6, patch_size=4, input_shape=(3, 64, 64),
                                 num_classes=0),                                    #  32,597,424    36
    # For a CPU: the 8x8 digits, and small latents for tests.
    "uvit_digits": UViTConfig(depth=5, width=128, num_heads=4, input_shape=(1, 8, 8), num_classes=10),
    "dit_digits":  DiTConfig(depth=6,  width=96,  num_heads=3, input_shape=(1, 8, 8), num_classes=10),
    "uvit_tiny":   UViTConfig(depth=3, width=64,  num_heads=2, input_shape=(4, 8, 8), num_classes=10),
    "dit_tiny":    DiTConfig(depth=3,  width=64,  num_heads=2, input_shape=(4, 8, 8), num_classes=10),
    "lightningdit_tiny": LightningDiTConfig(depth=3, width=64, num_heads=2, patch_size=2, input_shape=(4, 8, 8),
                                            num_classes=10),
    "jit_tiny":    JiTConfig(depth=4,  width=64,  num_heads=2, patch_size=2, input_shape=(4, 8, 8), num_classes=10,
                             bottleneck=8, context_length=4, context_start=1),
    "adm_unet_tiny": ADMUNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,),
                                   num_head_channels=16, input_shape=(3, 16, 16), num_classes=10),
}
# fmt: on
"""Configuration by preset name, beside it parameters and operations (10^9, forward and backward).
U-ViT's and DiT's patches are 2x2; the U-ViTs end with the 3x3 convolution, as ERD's do."""


def model_config(name: str, **overrides: Any) -> BackboneConfig:
    """The configuration of a preset, with fields replaced: `model_config("dit_b2", num_classes=10)`.

    Raises:
        ValueError: an unknown name or field, or an impossible value.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}{nearest(name, MODELS)}; choose from {', '.join(MODELS)}")
    fields = [field.name for field in dataclasses.fields(MODELS[name])]
    for key in overrides:
        if key not in fields:
            raise ValueError(f"{name} has no field {key!r}{nearest(key, fields)}; it has {', '.join(fields)}")
    return dataclasses.replace(MODELS[name], **overrides)


def build_model(name: str, **overrides: Any) -> Backbone:
    """The network of a preset with freshly drawn weights; arguments and errors as `model_config`."""
    return model_config(name, **overrides).build()


def nearest(name: str, known: Iterable[str]) -> str:
    """The phrase " (did you mean ...?)", or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
