"""Precision fp8: bf16, with the large products of the blocks in float8; and what that does to the loss.

Swapped are the Linears of `Attention` (qkv, proj), `Mlp` (fc1, fc2) and `SwiGlu` (w12, w3). Not the modulation, which a
sample meets once, and not what stands in the residual stream itself: embeddings, the final layer and U-ViT's long
skips, whose rounding no later addition to the stream would outweigh.

Parameters, their names and their float32 values are those of the other precisions: checkpoints are interchangeable.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from erdfast.data import Batch
from erdfast.models import Backbone
from erdfast.models.layers import Attention, Mlp, plain
from erdfast.models.rope_layers import SwiGlu
from erdfast.ops.fp8_linear import FP8_MULTIPLE, fp8_fits, fp8_linear

from .parallel import World
from .step import DiffusionStep

LARGEST_DIFFERENCE = 0.01
"""Relative difference of the loss to bf16's that is worth a line: ten times the largest of dit_tiny and uvit_tiny in
200 steps (0.09%, at batch 32)."""


class Float8Linear(nn.Linear):
    """A Linear that multiplies in float8. Only ever made from a Linear by `apply_fp8`, which changes its class."""

    fp8_backend: str

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) => (..., M), in autocast's dtype."""
        return fp8_linear(x, self.weight, self.bias, backend=self.fp8_backend)


def apply_fp8(model: Backbone, backend: str) -> list[str]:
    """Let the network's large products run in float8, in place; parameters and their names stay.

    Args:
        model: not yet compiled or sharded.
        backend: of `fp8_linear`.

    Returns:
        The names of the swapped layers.

    Raises:
        ValueError: none of the layers has sizes that float8 takes.
    """
    swapped = []
    for block in model.blocks_for_sharding():
        for part in block.modules():
            if isinstance(part, Attention | Mlp | SwiGlu):
                swapped += [layer for layer in part.children() if plain(layer, nn.Linear) and fp8_fits(layer.weight)]
    if not swapped:
        raise ValueError(
            f"precision fp8 needs widths that are multiples of {FP8_MULTIPLE}, which no layer of this network has; "
            "choose bf16, fp32 or auto"
        )
    for layer in swapped:
        layer.__class__, layer.fp8_backend = Float8Linear, backend
    return [name for name, layer in model.named_modules() if isinstance(layer, Float8Linear)]


@contextlib.contextmanager
def without_fp8(model: nn.Module) -> Iterator[None]:
    """Within it, the network multiplies as in bf16."""
    layers: list[nn.Module] = [layer for layer in model.modules() if isinstance(layer, Float8Linear)]
    for layer in layers:
        layer.__class__ = nn.Linear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = Float8Linear


@torch.no_grad()
def loss_difference(step: DiffusionStep, world: World, batch: Batch, number: Tensor, offset: Tensor) -> float:
    """How far float8 moves the loss of a micro-batch: (fp8 - bf16) / bf16, on the same samples, times and noise.

    Two forward passes, neither of them compiled: what the compiler made for training stays as it is.

    Args:
        step: with swapped layers; under FSDP too.
        world: the processes that train together; all must call it, each with its own samples.
        batch: a micro-batch, on the device.
        number, offset: the step, and where in its global batch the micro-batch begins; 0-d int64 on the device.
    """
    x, y, moments_scale = batch
    with torch.compiler.set_stance("force_eager"):
        low = step(x, y, number, offset, moments_scale).loss
        with without_fp8(step.model):
            usual = step(x, y, number, offset, moments_scale).loss
    if isinstance(step.model, FSDPModule):
        step.model.reshard()  # without a backward pass, what is around the blocks would stay gathered
    both = world.all_reduce(torch.stack([low, usual]).double())
    return float(both[0] / both[1] - 1)


def describe_difference(difference: float) -> str | None:
    """A line for people if float8 moves the loss by more than LARGEST_DIFFERENCE (or it is not finite)."""
    if abs(difference) <= LARGEST_DIFFERENCE:
        return None
    return (
        f"the loss in fp8 is {100 * difference:+.1f}% from that in bf16 on the same samples and weights; "
        f"beyond {100 * LARGEST_DIFFERENCE:g}% compare with a run in --precision bf16"
    )
