"""Variants of kernels/modulated_norm.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.variants import DTYPES, Variant, pointers

WIDTHS = (384, 768, 1024, 1152, 1536)


class Case(NamedTuple):
    """What a variant reads and writes."""

    label: str
    width: int
    stream: str
    """Dtype of x and r."""
    other: str
    """Dtype of branch, gate, shift, scale and y."""
    norm: str = "layer"
    branch: bool = True
    modulated: bool = True
    affine: bool = False


def cases() -> Iterator[Case]:
    """The float32 stream of autocast at every width; every dtype; what the backbones ask for; an odd width."""
    for width in WIDTHS:
        yield Case(f"{width} autocast", width, "fp32", "bf16")
    for dtype in DTYPES:
        yield Case(f"1152 {dtype}", 1152, dtype, dtype)
    yield Case("1152 autocast, norm alone", 1152, "fp32", "bf16", branch=False)
    yield Case("1152 autocast, no parameters", 1152, "fp32", "bf16", branch=False, modulated=False)
    yield Case("1152 autocast, U-ViT", 1152, "fp32", "bf16", modulated=False, affine=True)
    yield Case("1152 autocast, U-ViT, norm alone", 1152, "fp32", "bf16", branch=False, modulated=False, affine=True)
    yield Case("1152 autocast, RMS", 1152, "fp32", "bf16", norm="rms", affine=True)
    yield Case("1152 autocast, no norm", 1152, "fp32", "bf16", norm="none", modulated=False)
    yield Case("1025 autocast", 1025, "fp32", "bf16", affine=True)
    yield Case("4096 fp32", 4096, "fp32", "fp32", affine=True)


def variants() -> Iterator[Variant]:
    """Forward and backward."""
    for case in cases():
        yield _forward(case)
        yield _backward(case)


def aligned(signature: dict[str, str], width: int) -> tuple[str, ...]:
    """As a launch finds it: tensors aligned, width and strides if they are multiples of 16."""
    sizes = [name for name in signature if name == "width" or name.endswith("stride")] if width % 16 == 0 else []
    return (*(name for name, kind in signature.items() if kind.startswith("*")), *sizes)


def _inputs(case: Case) -> dict[str, str]:
    gate = case.branch and (case.modulated or case.norm == "none")
    return pointers(
        branch=case.other if case.branch else None,
        gate=case.other if gate else None,
        scale=case.other if case.modulated else None,
        weight="fp32" if case.affine else None,
    )


def _integers(case: Case, stream: str) -> dict[str, str]:
    names = ["length", "width", "total_rows", "chunks", f"{stream}_batch_stride", f"{stream}_row_stride"]
    names += ["branch_batch_stride", "branch_row_stride", "gate_stride", "scale_stride"]
    return dict.fromkeys(names, "i32")


def _forward(case: Case) -> Variant:
    from erdfast.kernels.modulated_norm import NORMS, ROWS, forward_warps, modulated_norm_kernel, row_block

    has_norm = case.norm != "none"
    signature = pointers(x=case.stream, residual=case.stream if case.branch else None) | _inputs(case)
    signature |= pointers(
        y=case.other if has_norm else None,
        stats="fp32" if has_norm else None,
        shift=case.other if case.modulated else None,
        bias="fp32" if case.affine and case.norm == "layer" else None,
    )
    signature |= {"eps": "fp32", "shift_stride": "i32"} | _integers(case, "x")
    block = row_block(case.width)
    constants = {"NORM": NORMS[case.norm], "ROWS": ROWS, "BLOCK": block}
    names = aligned(signature, case.width)
    warps = forward_warps(block, has_norm)
    return Variant("modulated_norm", case.label, modulated_norm_kernel, signature, constants, names, warps)


def _backward(case: Case) -> Variant:
    from erdfast.kernels import modulated_norm as kernels

    has_norm = case.norm != "none"
    inputs = _inputs(case)
    gated = "gate_ptr" in inputs
    if not gated:
        inputs.pop("branch_ptr", None)
    sums = has_norm and (case.modulated or case.affine)
    copied = case.branch and (gated or case.other != case.stream)
    signature = inputs | pointers(
        grad_x=case.stream if has_norm else None,
        grad_branch=case.other if copied else None,
        partials="fp32" if sums or gated else None,
        grad_residual=case.stream if case.branch else None,
        grad_y=case.other if has_norm else None,
        r=case.stream,
        stats="fp32" if has_norm else None,
    )
    signature |= _integers(case, "r")
    block = kernels.row_block(case.width)
    constants = {"NORM": kernels.NORMS[case.norm], "NORM_SUMS": sums, "GATE_SUM": gated, "BLOCK": block}
    constants |= {"ROWS": kernels.grad_split(256).rows, "STAGES": kernels.GRAD_STAGES}
    fn, warps = kernels.modulated_norm_grad_kernel, kernels.grad_warps(block, has_norm)
    names = aligned(signature, case.width)
    return Variant("modulated_norm_grad", case.label, fn, signature, constants, names, warps)
