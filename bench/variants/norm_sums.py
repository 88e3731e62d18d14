"""Variants of kernels/norm_sums.py."""

from __future__ import annotations

from collections.abc import Iterator

from bench.variants import DTYPES, Variant, pointers
from bench.variants.modulated_norm import aligned


def variants() -> Iterator[Variant]:
    """Per sample and per channel."""
    from erdfast.kernels import norm_sums as kernels

    for dtype in DTYPES:
        signature = pointers(grad_shift=dtype, grad_scale=dtype, grad_gate=dtype, partials="fp32")
        signature |= {"width": "i32", "chunks": "i32"}
        constants = {"NORM_SUMS": True, "GATE_SUM": True, "STEPS": 1}
        constants |= {"CHUNKS": kernels.SUM_CHUNKS, "BLOCK": kernels.SUM_CHANNELS}
        names = aligned(signature, 1152)
        yield Variant("add_sample_sums", dtype, kernels.add_sample_sums_kernel, signature, constants, names, 4)
    for scaled in (False, True):
        signature = pointers(grad_weight="fp32", grad_bias="fp32", partials="fp32", scale="bf16" if scaled else None)
        signature |= dict.fromkeys(("width", "chunks", "total", "scale_stride"), "i32")
        constants = {"SUMS": 3 if scaled else 2, "STEPS": 8}
        constants |= {"ROWS": kernels.CHANNEL_ROWS, "BLOCK": kernels.CHANNEL_BLOCK}
        names = aligned(signature, 1152)
        label = "with scale" if scaled else "without scale"
        yield Variant("add_channel_sums", label, kernels.add_channel_sums_kernel, signature, constants, names, 4)
