"""What the variants of add_noise and diffusion_loss share: the inputs of erdfast/ops/source.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.variants import DTYPES, pointers

STRIDES = ("x0_stride", "noise_stride", "pred_stride")
PIXELS = ("x0_pixel", "noise_pixel", "pred_pixel", "grad_pixel", "out_pixel")
INTEGERS = dict.fromkeys(("n", "quarter", "chunks", "pixels", *STRIDES, *PIXELS), "i32")
SINGLE = dict.fromkeys(("n", "quarter", "chunks", "pixels", *STRIDES), 1) | dict.fromkeys(PIXELS, 0)
"""Samples of one element: Triton turns arguments that equal 1 into constants."""
_SCALARS = (
    "alpha_ptr",
    "sigma_ptr",
    "c_x_ptr",
    "c_eps_ptr",
    "w_ptr",
    "seed_ptr",
    "stream_ptr",
    "ids_ptr",
    "grad_scale_ptr",
)


def aligned(kernel: Any, signature: dict[str, str], sizes: bool) -> tuple[str, ...]:
    """As a launch finds it: tensors aligned, the pointers to scalars not looked at, sizes if they are
    multiples of 16."""
    tensors = [name for name, kind in signature.items() if kind.startswith("*") and name not in _SCALARS]
    return (*tensors, *(("n", "quarter", *(name for name in STRIDES if name in kernel.arg_names)) if sizes else ()))


class Case(NamedTuple):
    """What a variant reads and writes."""

    label: str
    dtype: str
    """Of the output, or of pred and the gradient."""
    x0: str
    keyed: bool
    moments: bool
    sizes_aligned: bool
    channels_last: bool = False
    """x0 and the output, or pred and the gradient."""


def cases() -> Iterator[Case]:
    """Dtypes, key or noise, with or without moments; mixed dtypes and odd sizes once."""
    for dtype in DTYPES:
        for keyed in (True, False):
            for moments in (False, True):
                label = f"{dtype} {'key' if keyed else 'noise'}{' moments' * moments}"
                yield Case(label, dtype, dtype, keyed, moments, True)
    yield Case("bf16/fp32 key", "bf16", "fp32", True, False, True)
    for dtype in DTYPES:
        yield Case(f"{dtype} key channels-last", dtype, dtype, True, False, True, True)
    yield Case("bf16 key moments ch-last", "bf16", "bf16", True, True, True, True)
    yield Case("fp32 key odd n", "fp32", "fp32", True, False, False)


def noise_inputs(case: Case) -> dict[str, str]:
    """The signature of x0 and of the noise or its key."""
    key = "i64" if case.keyed or case.moments else None
    return pointers(x0=case.x0, noise=None if case.keyed else "fp32", seed=key, stream=key, ids=key)
