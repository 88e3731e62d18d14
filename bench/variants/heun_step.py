"""Variants of kernels/heun_step.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.variants import DTYPES, Variant, pointers


class Case(NamedTuple):
    """What a variant reads and writes."""

    label: str
    pred: str
    input: str | None
    """Dtype of the network's next input; None after the last step."""
    guided: bool
    copies: int
    corrector: bool
    single: bool = False
    """Samples of one element: Triton compiles integers that equal 1 in."""


def variants() -> Iterator[Variant]:
    """Predictor and corrector for each dtype of the network, guided and not; the last step, odd and single sizes."""
    for dtype in DTYPES:
        for guided in (True, False):
            for corrector in (True, False):
                label = f"{dtype}{' guided' * guided}{' corrector' * corrector}"
                yield _variant(Case(label, dtype, dtype, guided, 1 + guided, corrector))
    yield _variant(Case("bf16/fp32 guided", "bf16", "fp32", True, 2, False))
    yield _variant(Case("bf16 last", "bf16", None, False, 0, False))
    yield _variant(Case("bf16 odd n", "bf16", "bf16", True, 2, True), aligned_sizes=False)
    yield _variant(Case("bf16 n = 1", "bf16", "bf16", False, 1, False, single=True))


def _variant(case: Case, *, aligned_sizes: bool = True) -> Variant:
    from erdfast.kernels.heun_step import BLOCK, heun_step_kernel

    x_in = "fp32" if case.corrector else None
    signature = pointers(out="fp32", input=case.input, pred=case.pred, x="fp32", x_in=x_in)
    aligned = tuple(signature)
    constants = {"GUIDED": case.guided, "COPIES": case.copies, "BLOCK": BLOCK}
    signature |= pointers(row="fp32") | {"batch": "i32"}
    if case.single:
        constants |= {"n": 1, "pred_stride": 1, "chunks": 1}
    else:
        signature |= {"n": "i32", "pred_stride": "i32", "chunks": "i32"}
        aligned += ("n", "pred_stride") * aligned_sizes
    return Variant("heun_step", case.label, heun_step_kernel, signature, constants, aligned, num_warps=4)
