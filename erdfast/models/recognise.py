"""Which network a checkpoint belongs to, from the names and shapes of its tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .adm_unet import ADMUNetConfig
from .backbone import BackboneConfig
from .dit import DiTConfig
from .jit import JiTConfig
from .lightningdit import LightningDiTConfig
from .uvit import UViTConfig

Weights = Mapping[str, Tensor]
Fields = dict[str, Any]

SIGNATURES: dict[str, str] = {
    "jit": "x_embedder.proj1.weight",
    "lightningdit": "blocks.0.mlp.w12.weight",
    "dit": "blocks.0.adaLN_modulation.1.weight",
    "uvit": "mid_block.norm1.weight",
    "adm_unet": "input_blocks.0.0.weight",
    "diffusers": "transformer_blocks.0.attn1.to_q.weight",
}
"""A tensor that a backbone's checkpoints hold and those of the backbones below it do not."""

HEADS: dict[int, int] = {384: 6, 512: 8, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24, 1792: 28}
"""Attention heads of the published transformers by width: shapes do not tell them."""

CONTEXT_START: dict[int, int] = {12: 4, 24: 8, 32: 10}
"""Where the published JiTs of so many blocks begin to see the label's tokens."""


def recognise(weights: Weights, where: str, **given: Any) -> BackboneConfig:
    """The configuration of the network that has these weights.

    Args:
        weights: tensors by published name, without tables that a network computes.
        where: what errors call them.
        given: fields of the configuration that are known better; needed are those that no shape tells, where the
            network is none of the published ones: `num_heads`, `context_start`, an `input_shape` that is no square.

    Raises:
        ValueError: no backbone has such names, or a field is missing; the message says which.
    """
    kind = next((name for name, key in SIGNATURES.items() if key in weights), None)
    if kind in FIELDS:
        config, fields = FIELDS[kind]
        try:
            return config(**(fields(weights, given) | given))
        except KeyError as error:
            raise ValueError(f"{where} looks like a {kind}, but has no {error}") from error
        except TypeError as error:
            raise ValueError(f"{where} is a {kind}: {error}") from error
        except IndexError as error:
            raise ValueError(f"{where} looks like a {kind}, but a tensor of it has too few dimensions") from error
    if kind == "adm_unet":
        raise ValueError(f"{where} is an ADM UNet, whose weights do not tell its image size and heads: give its config")
    if kind == "diffusers":
        raise ValueError(f"{where} has the names of diffusers' DiT: load its folder with erdfast.models.from_diffusers")
    some = ", ".join(list(weights)[:3])
    raise ValueError(f"{where} is none of {', '.join(FIELDS)}, adm_unet: it holds {some}, ...")


def told_by_weights(config: ADMUNetConfig, weights: Weights) -> ADMUNetConfig:
    """`config` with what an ADM UNet's weights do tell: no classes, a null class or none, a learned variance."""
    told: Fields = {}
    channels, bias, labels = config.input_shape[0], weights.get("out.2.bias"), weights.get("label_emb.weight")
    if bias is not None and bias.numel() in (channels, 2 * channels):
        told["learn_sigma"] = bias.numel() == 2 * channels
    if labels is None:
        told["num_classes"] = 0
    elif len(labels) - config.num_classes in (0, 1):
        told["null_class"] = len(labels) > config.num_classes
    return dataclasses.replace(config, **told)


def _blocks(weights: Weights, prefix: str) -> int:
    """How many blocks there are: 0, 1, ... behind `prefix`, none left out."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)}
    expected = {str(number) for number in range(len(numbers))}
    if numbers != expected:  # one stray name must not ask for a million blocks
        stray = ", ".join(sorted(numbers - expected)[:3])
        raise ValueError(
            f"{prefix}* is not numbered from 0 without a gap: there are {len(numbers)}, one of them {stray}"
        )
    return len(numbers)


def _heads(width: int, weights: Weights, given: Fields) -> int:
    if "num_heads" in given:
        return given["num_heads"]
    if (norm := weights.get("blocks.0.attn.q_norm.weight")) is not None:
        return width // norm.numel()
    if width not in HEADS:
        raise ValueError(f"no published network is {width} wide: give num_heads")
    return HEADS[width]


def _side(patches: int, patch_size: int, given: Fields) -> int:
    if "input_shape" in given:
        return 0  # not needed
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} patches are no square: give input_shape")
    return side * patch_size


def _transformer(weights: Weights, given: Fields, *, patch: str, labels: str, extra_tokens: int, blocks: int) -> Fields:
    """What all transformers tell in the same way."""
    width = weights["pos_embed"].shape[2]
    channels, patch_size = weights[patch].shape[1], weights[patch].shape[2]
    side = _side(weights["pos_embed"].shape[1] - extra_tokens, patch_size, given)
    return {
        "input_shape": (channels, side, side),
        "patch_size": patch_size,
        "width": width,
        "depth": blocks,
        "num_heads": _heads(width, weights, given),
        "num_classes": weights[labels].shape[0] - 1 if labels in weights else 0,
    }


def _dit(weights: Weights, given: Fields) -> Fields:
    fields = _adaln(weights, given, patch="x_embedder.proj.weight")
    numbers = weights["final_layer.linear.weight"].shape[0]
    hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
    learn_sigma = numbers == 2 * fields["patch_size"] ** 2 * fields["input_shape"][0]
    return fields | {"learn_sigma": learn_sigma, "mlp_ratio": hidden / fields["width"]}


def _adaln(weights: Weights, given: Fields, *, patch: str) -> Fields:
    labels, blocks = "y_embedder.embedding_table.weight", _blocks(weights, "blocks.")
    return _transformer(weights, given, patch=patch, labels=labels, extra_tokens=0, blocks=blocks)


def _lightningdit(weights: Weights, given: Fields) -> Fields:
    fields = _adaln(weights, given, patch="x_embedder.proj.weight")
    return fields | {"qk_norm": "blocks.0.attn.q_norm.weight" in weights}


def _jit(weights: Weights, given: Fields) -> Fields:
    fields = _adaln(weights, given, patch="x_embedder.proj1.weight")
    context = weights.get("in_context_posemb")
    start = given.get("context_start", CONTEXT_START.get(fields["depth"]))
    if context is not None and start is None:
        raise ValueError(f"no published JiT has {fields['depth']} blocks: give context_start")
    return fields | {
        "bottleneck": weights["x_embedder.proj1.weight"].shape[0],
        "context_length": 0 if context is None else context.shape[1],
        "context_start": start or 0,
    }


def _uvit(weights: Weights, given: Fields) -> Fields:
    labels, blocks = "label_emb.weight", 2 * _blocks(weights, "in_blocks.") + 1
    extra = 2 if labels in weights else 1
    fields = _transformer(
        weights, given, patch="patch_embed.proj.weight", labels=labels, extra_tokens=extra, blocks=blocks
    )
    return fields | {
        "mlp_ratio": weights["mid_block.mlp.fc1.weight"].shape[0] / fields["width"],
        "conv": "final_layer.weight" in weights,
        "mlp_time_embed": "time_embed.0.weight" in weights,
        "qkv_bias": "mid_block.attn.qkv.bias" in weights,
    }


FIELDS: dict[str, tuple[type[BackboneConfig], Callable[[Weights, Fields], Fields]]] = {
    "jit": (JiTConfig, _jit),
    "lightningdit": (LightningDiTConfig, _lightningdit),
    "dit": (DiTConfig, _dit),
    "uvit": (UViTConfig, _uvit),
}
"""Configuration and what the weights tell of it, by backbone."""
