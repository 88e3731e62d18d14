"""A Linear with its three products in float8 beside the same in its input's dtype (eager), and torch.compile of that.

`python -m bench.bench_fp8_linear` prints a table and writes bench/results/<device>/fp8_linear.json. The fused side is
compiled, as in a training step: the maximum, the scaling and the cast are then one kernel each. On a CPU it is the
emulation, which shows nothing but that it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, run_cases
from erdfast.ops.fp8_linear import fp8_linear, fp8_reason

OP = "fp8_linear"
SHAPES = {
    # rows, in, out: qkv, projection, both of the MLP of width 1152 at batch 128; of width 768 at batch 256
    "cuda": (
        *((33024, 1152, 3456), (33024, 1152, 1152), (33024, 1152, 4608), (33024, 4608, 1152)),
        *((65536, 768, 2304), (65536, 768, 3072)),
    ),
    "cpu": ((512, 128, 384),),
}


def make_case(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Case:
    """Input, weight and bias in one dtype: the cast of float32 weights is the same on every side."""
    rows, inner, outer = shape

    def make_inputs(i: int) -> tuple[Tensor, ...]:
        sizes = ((rows, inner), (outer, inner), (outer,))
        return tuple(torch.randn(s, device=device).to(dtype).requires_grad_() for s in sizes)

    emulated = fp8_reason(torch.device(device)) is not None
    fused = partial(fp8_linear, backend="reference" if emulated else "scaled_mm")
    ends, weight = rows * (inner + outer), inner * outer
    return Case(
        name=f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}",
        fields={"shape": list(shape), "dtype": dtype},
        make_inputs=make_inputs,
        sides={"eager": F.linear, "fused": fused if emulated else torch.compile(fused, dynamic=False)},
        # Forward: input and weight in, result out. Backward: those and the gradient in, two gradients out.
        bytes={"forward": dtype.itemsize * (ends + weight), "backward": dtype.itemsize * (2 * ends + 2 * weight)},
        flops={"forward": 2 * rows * weight, "backward": 4 * rows * weight},
        backend="reference" if emulated else "scaled_mm",
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
