"""Variants of kernels/qk_norm_rope.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.variants import DTYPES, Variant, pointers


class Case(NamedTuple):
    """What a variant computes."""

    dtype: str
    head_width: int
    norm: bool = True
    rope: bool = True
    unit: int = 8
    """What the strides of the incoming gradients are multiples of: 8 for K = 72, dense."""

    @property
    def label(self) -> str:
        parts = [self.dtype, f"K={self.head_width}", "norm" * self.norm, "rope" * self.rope]
        return " ".join(filter(None, parts)) + ("" if self.unit > 1 else " odd strides")


def variants() -> Iterator[Variant]:
    """Forward and backward: dtypes, head widths, either half alone, and an odd width."""
    cases = [Case(dtype, width) for dtype in DTYPES for width in (64, 72)]
    cases += [Case("bf16", width) for width in (32, 80, 96, 128, 256)]
    cases += [Case("bf16", 64, rope=False), Case("bf16", 72, norm=False), Case("bf16", 51, rope=False, unit=1)]
    for case in cases:
        yield _variant(case, backward=False)
        yield _variant(case, backward=True)


def _variant(case: Case, *, backward: bool) -> Variant:
    from erdfast.kernels.qk_norm_rope import (
        BACKWARD_TILE,
        SIZES,
        STRIDES,
        TILE,
        partition,
        qk_norm_rope_backward_kernel,
        qk_norm_rope_kernel,
    )

    weight, angle = "fp32" if case.norm else None, "fp32" if case.rope else None
    signature = pointers(qkv=case.dtype, q_weight=weight, k_weight=weight, cos=angle, sin=angle)
    part = partition(128, 256, 16, case.head_width, BACKWARD_TILE if backward else TILE)
    constants = {"K": case.head_width, "PADDED": part.padded, "ROWS": part.rows}
    if backward:
        signature |= pointers(dqkv=case.dtype, partials=weight, dq=case.dtype, dk=case.dtype, dv=case.dtype)
        signature |= dict.fromkeys(STRIDES, "i32")
        constants |= {"UNIT": case.unit}
    else:
        signature |= pointers(q=case.dtype, k=case.dtype)
    aligned = tuple(signature.keys() - set(STRIDES))
    signature |= {"eps": "fp32"} | dict.fromkeys(SIZES, "i32")
    kernel = qk_norm_rope_backward_kernel if backward else qk_norm_rope_kernel
    name = f"{'backward ' * backward}{case.label}"
    return Variant("qk_norm_rope", name, kernel, signature, constants, aligned, num_warps=4)
