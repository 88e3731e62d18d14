"""SwiGLU's gate beside eager PyTorch (as LightningDiT spells it) and torch.compile.

`python -m bench.bench_swiglu` prints a table and writes bench/results/<device>/swiglu.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, backend_of, run_cases
from erdfast.ops.swiglu import swiglu

OP = "swiglu"
SHAPES = {
    "cuda": ((128 * 256, 3072), (256 * 256, 2048), (256 * 256, 1024), (4001, 1365)),
    "cpu": ((128 * 16, 256), (333, 341)),
}
"""Tokens and hidden width M (LightningDiT at widths 1152, 768 and 384), and sizes that are multiples of nothing."""


def eager(x: Tensor) -> Tensor:
    """One pass for silu, one for the product; the halves are views."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


def make_case(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """Forward: reads both halves, writes y. Backward: reads both and the gradient of y, writes that of both."""

    def make_inputs(i: int) -> tuple[Tensor]:
        return (torch.randn(shape[0], 2 * shape[1], device=device).to(dtype).requires_grad_(),)

    size = dtype.itemsize * torch.Size(shape).numel()
    return Case(
        name=f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')}",
        fields={"shape": list(shape), "dtype": dtype},
        make_inputs=make_inputs,
        sides={"eager": eager, "fused": swiglu},
        bytes={"forward": 3 * size, "backward": 5 * size},
        backend=backend_of(OP, device, dtype),
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Every size and dtype."""
    for dtype in dtypes:
        for shape in SHAPES[device]:
            yield make_case(shape, dtype, device)


def main() -> None:
    """Measure, print, save."""
    run_cases(OP, cases, __doc__)


if __name__ == "__main__":
    main()
