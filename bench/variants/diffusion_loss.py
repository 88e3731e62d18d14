"""Variants of kernels/diffusion_loss.py."""

from __future__ import annotations

from collections.abc import Iterator

from bench.variants import DTYPES, Variant, pointers
from bench.variants._source import INTEGERS, Case, aligned, cases, noise_inputs


def variants() -> Iterator[Variant]:
    """The loss, the second stage of its sums, and the scale of its gradient."""
    for case in cases():
        yield _variant(case)
    for moments in (False, True):
        case = Case(f"bf16 key{' moments' * moments}", "bf16", "bf16", True, moments, True)
        yield _variant(case, " sums only", grad=False)
        yield _variant(case, " grad only", sums=False)
        yield _variant(case, " 8 steps", steps=8)
    yield from _reductions()


def _variant(case: Case, label: str = "", *, sums=True, grad=True, steps=1) -> Variant:
    from erdfast.kernels.diffusion_loss import diffusion_loss_kernel
    from erdfast.kernels.layout import MAX_BLOCK, partition

    signature = pointers(pred=case.dtype, c_x="fp32", c_eps="fp32", w="fp32") | noise_inputs(case)
    signature |= pointers(sums="fp32" if sums else None)
    signature |= pointers(grad=case.dtype, grad_scale="fp32") if grad else {}
    signature |= {"moments_scale": "fp32", "grad_unit": "fp32"} | INTEGERS
    constants = {"KEYED": case.keyed, "MOMENTS": case.moments, "STEPS": steps, "BLOCK": MAX_BLOCK}
    constants |= {"X0_LAST": case.channels_last, "NOISE_LAST": False, "PRED_LAST": case.channels_last}
    names = aligned(diffusion_loss_kernel, signature, case.sizes_aligned)
    warps = partition(4 * MAX_BLOCK).num_warps
    name = case.label + label
    return Variant("diffusion_loss", name, diffusion_loss_kernel, signature, constants, names, warps)


def _reductions() -> Iterator[Variant]:
    from erdfast.kernels.diffusion_loss import (
        LOSS_BLOCK,
        SCALE_BLOCK,
        add_partials_kernel,
        scale_kernel,
        weighted_mean_kernel,
    )
    from erdfast.kernels.layout import MAX_CHUNKS

    signature = pointers(sums="fp32", partials="fp32") | {"chunks": "i32"}
    names = ("sums_ptr", "partials_ptr")
    yield Variant("add_partials", "", add_partials_kernel, signature, {"BLOCK": MAX_CHUNKS}, names, 4)
    signature = pointers(loss="fp32", sums="fp32", w="fp32") | {"batch": "i32", "n": "i32"}
    names = ("loss_ptr", "sums_ptr", "w_ptr", "batch", "n")
    yield Variant("weighted_mean", "", weighted_mean_kernel, signature, {"BLOCK": LOSS_BLOCK}, names, 4)
    for dtype in DTYPES:
        signature = pointers(values=dtype, scale="fp32") | {"numel": "i32"}
        names = ("values_ptr", "numel")
        yield Variant("scale", dtype, scale_kernel, signature, {"BLOCK": SCALE_BLOCK}, names, 8)
