"""Variants of kernels/gelu.py."""

from __future__ import annotations

from collections.abc import Iterator

from bench.variants import DTYPES, Variant, pointers


def variants() -> Iterator[Variant]:
    """Forward and backward; shapes matter only as to whether the number of elements is a multiple of 16."""
    from erdfast.kernels.gelu import BLOCK, NUM_WARPS, gelu_grad_kernel, gelu_kernel

    for dtype in DTYPES:
        for tanh in (False, True):
            for odd in (False, True) if dtype == "bf16" else (False,):
                label = f"{dtype} {'tanh' if tanh else 'exact'}{' odd' * odd}"
                constants = {"TANH": tanh, "BLOCK": BLOCK}
                for kernel, fn, names in (
                    ("gelu", gelu_kernel, ("y", "x")),
                    ("gelu_grad", gelu_grad_kernel, ("grad_x", "grad_y", "x")),
                ):
                    signature = pointers(**dict.fromkeys(names, dtype))
                    aligned = (*signature, *(() if odd else ("numel",)))
                    signature = signature | {"numel": "i32"}
                    yield Variant(kernel, label, fn, signature, constants, aligned, NUM_WARPS)
