"""Activation checkpointing: blocks keep their inputs alone, and are computed again in backward.

full        everything of a block: a third more operations, the least memory
selective   matrix products and attention are kept, norms, activations and residuals computed again: hardly more time

Gradients are those without, to the last bit; but of a compiled U-ViT to rounding, because three gradients meet where a
skip leaves the stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from erdfast.models import Backbone
from erdfast.models.layers import Stream, joined

MODES = ("none", "selective", "full")
_KEPT = frozenset(
    {
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_mm", "aten::linear", "aten::convolution"),
        *("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        *("aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention"),
        *("erdfast::attention", "erdfast::attention_qkv"),
    }
)
"""Ops whose results selective keeps: they cost the most to compute and the least to keep."""


def apply_recompute(model: Backbone, mode: str) -> None:
    """Change how the network's blocks run, in place; parameters and their names stay.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown recompute mode {mode!r}; choose from {', '.join(MODES)}")
    if mode == "none":
        return
    # No block draws from a generator (dropout is a function of its key), whose state would have to be kept.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks_for_sharding():
        # What is kept between blocks is the stream alone, not the last branch as well, of which it is a part. Selective
        # keeps that branch anyhow, as the result of a product; but not both and their sum.
        summed = mode == "full" or getattr(block, "shares_sum", False)
        forward = functools.partial(_summed_up, block.forward) if summed else block.forward
        block.forward = functools.partial(checkpoint, forward, **options)


def _summed_up(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A block that ends with the sum that it would leave to the next norm."""
    return _joined(forward(*args, **options))


def _joined(result: Any) -> Any:
    if isinstance(result, Stream):
        return Stream(joined(result))
    return tuple(map(_joined, result)) if isinstance(result, tuple) else result


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = op.name() if isinstance(op, torch._ops.OpOverload) else str(op)
    kept = name.partition(".")[0] in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
