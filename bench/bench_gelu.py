"""GELU and its gradient beside eager PyTorch and torch.compile; and the Linear before it, which may apply it.

A product applies GELU in its epilogue where no gradient is needed.

PyTorch's eager GELU is one pass each way as well: the kernel has to match it, what it can gain is its gradient.
`python -m bench.bench_gelu` prints a table and writes bench/results/<device>/gelu.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, backend_of, run_cases
from erdfast.ops.gelu import gelu, linear_gelu

OP = "gelu"
SHAPES = {
    "cuda": ((128 * 256, 4608), (256 * 256, 3072), (256 * 256, 1536), (4001, 1333)),
    "cpu": ((128 * 18, 512), (333, 331)),
}
"""Tokens and hidden width of the presets, and sizes that are multiples of nothing."""


def elementwise(shape: tuple[int, int], dtype: torch.dtype, approximate: str, device: str) -> Case:
    """Forward: one read, one write. Backward: two reads, one write."""

    def make_inputs(i: int) -> tuple[Tensor]:
        return (torch.randn(shape, device=device).to(dtype).requires_grad_(),)

    def eager(x: Tensor) -> Tensor:
        return F.gelu(x, approximate=approximate)

    def fused(x: Tensor) -> Tensor:
        return gelu(x, approximate)

    size = dtype.itemsize * torch.Size(shape).numel()
    return Case(
        name=f"{shape[0]}x{shape[1]} {str(dtype).removeprefix('torch.')} {approximate}",
        fields={"shape": list(shape), "dtype": dtype, "approximate": approximate},
        make_inputs=make_inputs,
        sides={"eager": eager, "fused": fused},
        bytes={"forward": 2 * size, "backward": 3 * size},
        backend=backend_of(OP, device, dtype),
    )


def epilogue(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    """Linear(D -> 4D) and the tanh GELU without gradients, as in sampling: reads x and weight, writes the result."""
    tokens, hidden = shape
    width = hidden // 4

    def make_inputs(i: int) -> tuple[Tensor, ...]:
        shapes = ((tokens, width), (hidden, width), (hidden,))
        return tuple(torch.randn(s, device=device).to(dtype) for s in shapes)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_gelu(x, weight, bias, "tanh")

    return Case(
        name=f"{tokens}x{width} to {hidden} {str(dtype).removeprefix('torch.')} linear tanh",
        fields={"shape": [tokens, width, hidden], "dtype": dtype, "approximate": "tanh"},
        make_inputs=make_inputs,
        sides={"eager": eager, "fused": fused},
        passes=("forward",),
        bytes={"forward": dtype.itemsize * (tokens * (width + hidden) + width * hidden + hidden)},
        flops={"forward": 2 * tokens * width * hidden},
        backend="reference" if device == "cpu" else None,  # a GPU's library of products has the epilogue
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Both forms at every size, and the product's epilogue at the largest."""
    for dtype in dtypes:
        for shape in SHAPES[device]:
            for approximate in ("none", "tanh"):
                yield elementwise(shape, dtype, approximate, device)
        yield epilogue(SHAPES[device][0], dtype, device)


def main() -> None:
    """Measure, print, save."""
    run_cases(OP, cases, __doc__)


if __name__ == "__main__":
    main()
