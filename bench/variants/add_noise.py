"""Variants of kernels/add_noise.py."""

from __future__ import annotations

from collections.abc import Iterator

from bench.variants import Variant, pointers
from bench.variants._source import INTEGERS, SINGLE, Case, aligned, cases, noise_inputs


def variants() -> Iterator[Variant]:
    """All that a launch may ask for."""
    from erdfast.kernels.add_noise import add_noise_kernel
    from erdfast.kernels.layout import MAX_BLOCK, partition

    warps = partition(4 * MAX_BLOCK).num_warps
    for case in cases():
        signature = pointers(out=case.dtype, alpha="fp32", sigma="fp32") | noise_inputs(case)
        signature |= {"moments_scale": "fp32"} | INTEGERS
        constants = {"KEYED": case.keyed, "MOMENTS": case.moments, "BLOCK": MAX_BLOCK}
        constants |= {"X0_LAST": case.channels_last, "NOISE_LAST": False, "OUT_LAST": case.channels_last}
        names = aligned(add_noise_kernel, signature, case.sizes_aligned)
        yield Variant("add_noise", case.label, add_noise_kernel, signature, constants, names, warps)
    case = Case("fp32 key n = 1", "fp32", "fp32", True, False, False)
    signature = pointers(out="fp32", alpha="fp32", sigma="fp32") | noise_inputs(case) | {"moments_scale": "fp32"}
    constants = {"KEYED": True, "MOMENTS": False, "BLOCK": MAX_BLOCK} | SINGLE
    constants |= dict.fromkeys(("X0_LAST", "NOISE_LAST", "OUT_LAST"), False)
    names = aligned(add_noise_kernel, signature, case.sizes_aligned)
    yield Variant("add_noise", case.label, add_noise_kernel, signature, constants, names, warps)
