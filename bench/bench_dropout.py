"""Dropout by a key beside PyTorch's own, which draws from a generator and keeps a mask, and torch.compile of that.

`python -m bench.bench_dropout` prints a table and writes bench/results/<device>/dropout.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, backend_of, run_cases
from erdfast.ops.dropout import dropout
from erdfast.ops.source import NoiseKey

OP = "dropout"
RATE = 0.1
SHAPES = {
    "cuda": ((128, 256, 1280), (128, 256, 3413), (128, 192, 64, 64), (128, 768, 8, 8), (33, 257, 1365)),
    "cpu": ((16, 64, 256), (16, 64, 16, 16), (3, 257, 341)),
}
"""JiT-H's tokens and hidden layer (3413 is odd), images of ADM's, in channels-last; and multiples of nothing."""


def eager(x: Tensor, key: NoiseKey, place: Tensor) -> Tensor:
    """Another mask at every call."""
    return F.dropout(x, RATE)


def fused(x: Tensor, key: NoiseKey, place: Tensor) -> Tensor:
    """The op."""
    return dropout(x, RATE, key, place)


def make_case(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """Reads x and writes y; backward reads one gradient and writes the other."""

    def make_inputs(i: int) -> tuple[Tensor, NoiseKey, Tensor]:
        x = torch.randn(shape, device=device).to(dtype)
        if len(shape) == 4:
            x = x.to(memory_format=torch.channels_last)
        seed, step, place = torch.tensor([1, i, 3], device=device).unbind()
        key = NoiseKey(seed, step, torch.arange(shape[0], device=device))
        return x.requires_grad_(), key, place

    size = dtype.itemsize * torch.Size(shape).numel()
    return Case(
        name=f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}",
        fields={"shape": list(shape), "dtype": dtype, "rate": RATE},
        make_inputs=make_inputs,
        sides={"eager": eager, "fused": fused},
        bytes={"forward": 2 * size, "backward": 2 * size},
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
