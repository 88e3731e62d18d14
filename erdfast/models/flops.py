"""What a network costs: floating point operations, parameters and memory, without building it in memory.

Operations per image of a transformer's forward and backward pass, a multiplication and an addition counted as two:

    6 * T * P_tok + 6 * P_img + 12 * L * D * T^2

T tokens, P_tok weights that every token meets, P_img those that an image meets once, L blocks, D width. The
last term is the two products of attention. The forward pass is a third of it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from erdfast.models.backbone import BackboneConfig

COMPUTE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}
"""Bytes of a number around the matrix products, by precision; fp8 keeps less, which is not counted. Parameters are
float32 in all of them."""


def training_flops(config: BackboneConfig) -> int:
    """Operations of the forward and backward pass for one image."""
    return 3 * forward_flops(config)


def forward_flops(config: BackboneConfig) -> int:
    """Operations of the forward pass for one image (one call: guidance needs two)."""
    return 2 * config.accounting().products


@functools.cache
def parameter_count(config: BackboneConfig) -> int:
    """Parameters, including fixed position tables, counted on the meta device: no memory is used."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())


class TrainingMemory(NamedTuple):
    """Bytes on one device that holds everything (single device or DDP)."""

    parameters: int
    """float32 parameters."""
    gradients: int
    """float32 gradients."""
    optimizer: int
    """Adam's two float32 moments."""
    ema: int
    """float32 copies averaged over time."""
    compute_weights: int
    """The lower-precision copies of the weights that autocast keeps from the forward to the backward pass."""
    activations: int
    """What the forward pass keeps for the backward pass."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def training_memory(
    config: BackboneConfig, batch: int, precision: str = "bf16", *, num_emas: int = 1
) -> TrainingMemory:
    """Estimate of the memory of eager training with `batch` images per device.

    Per parameter: 4 bytes each for itself, its gradient, two moments and every EMA, and a copy in the lower
    precision. Per image: what autograd keeps (`BackboneConfig.accounting`), the residual stream and the
    norms' outputs in float32, the rest in the compute dtype: within 8% of the truth. Not in it: short-lived
    results, the allocator's fragmentation and the libraries' workspaces. torch.compile keeps less.

    Args:
        config: the network.
        batch: images per device and micro-step, at least 0.
        precision: "fp32", "bf16", "fp16" or "fp8".
        num_emas: averaged copies of the parameters.

    Raises:
        ValueError: an unknown precision or a negative number.
    """
    if precision not in COMPUTE_BYTES:
        raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(COMPUTE_BYTES)}")
    if batch < 0 or num_emas < 0:
        raise ValueError(f"batch and num_emas must be at least 0, not {batch} and {num_emas}")
    count, cost, width = parameter_count(config), config.accounting(), COMPUTE_BYTES[precision]
    return TrainingMemory(
        parameters=4 * count,
        gradients=4 * count,
        optimizer=8 * count,
        ema=4 * num_emas * count,
        compute_weights=width * count if width < 4 else 0,
        activations=batch * (width * cost.compute_activations + 4 * cost.residual_activations),
    )


def training_memory_bytes(config: BackboneConfig, batch: int, precision: str = "bf16") -> int:
    """`training_memory(...).total`: bytes per device, with one EMA."""
    return training_memory(config, batch, precision).total
