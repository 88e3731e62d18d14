"""The Linear(2D -> D) of a long skip: two products that add into one tensor beside the joined input (eager PyTorch, as
U-ViT spells it) and torch.compile of that.

`python -m bench.bench_skip_linear` prints a table and writes bench/results/<device>/skip_linear.json. On a CPU the op
joins as well; the side "products" shows why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, run_cases
from erdfast.ops.skip_linear import skip_linear

OP = "skip_linear"
SHAPES = {
    "cuda": ((128, 258, 1152), (128, 258, 1024), (256, 258, 768), (64, 257, 1000)),
    "cpu": ((128, 18, 128), (8, 65, 384)),
}


def eager(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The joined input."""
    return F.linear(torch.cat([x, skip], dim=-1), weight, bias)


def products(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Two products on any device."""
    return skip_linear(x, skip, weight, bias, method="products")


def make_case(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Case:
    """All inputs in one dtype: casts are the same on every side."""
    B, L, D = shape

    def make_inputs(i: int) -> tuple[Tensor, ...]:
        shapes = (shape, shape, (D, 2 * D), (D,))
        return tuple(torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes)

    rows, size = B * L, dtype.itemsize
    flops = 2 * rows * D * 2 * D
    sides = {"eager": eager, "fused": skip_linear} | ({"products": products} if device == "cpu" else {})
    return Case(
        name=f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}",
        fields={"shape": list(shape), "dtype": dtype},
        make_inputs=make_inputs,
        sides=sides,
        # Forward: x, skip and weight in, out out. Backward: those and the gradient in, three gradients out.
        bytes={"forward": size * (3 * rows * D + 2 * D * D), "backward": size * (5 * rows * D + 4 * D * D)},
        flops={"forward": flops, "backward": 2 * flops},
        backend="reference" if device == "cpu" else None,  # there the op joins as well
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
