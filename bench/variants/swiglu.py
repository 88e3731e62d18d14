"""Variants of kernels/swiglu.py."""

from __future__ import annotations

from collections.abc import Iterator

from bench.variants import DTYPES, Variant, pointers

HALVES = (3072, 1365)
"""The hidden width of LightningDiT at width 1152 (those at 384 and 768 are the same variant), and an odd one."""


def variants() -> Iterator[Variant]:
    """Forward and backward."""
    from erdfast.kernels.swiglu import column_block, swiglu_grad_kernel, swiglu_kernel

    for dtype in DTYPES:
        for half in HALVES:
            block = column_block(half)
            for kernel, fn, names in (
                ("swiglu", swiglu_kernel, ("y", "x")),
                ("swiglu_grad", swiglu_grad_kernel, ("grad_x", "grad_y", "x")),
            ):
                signature = pointers(**dict.fromkeys(names, dtype))
                aligned = (*signature, *(() if half % 16 else ("half",)))
                signature = signature | {"half": "i32"}
                label = f"{dtype} {half}"
                yield Variant(kernel, label, fn, signature, {"BLOCK": block}, aligned, block // 256)
