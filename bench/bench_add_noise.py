"""x_t = alpha*x0 + sigma*eps with computed ("drawn") or given noise: the op beside eager PyTorch and torch.compile.

Eager draws its noise by torch.randn_like. `python -m bench.bench_add_noise` prints a table and writes
bench/results/<device>/add_noise.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.harness import Case, backend_of, run_cases
from erdfast.ops import NoiseKey, add_noise
from erdfast.ops.backend import BACKENDS
from erdfast.process import Coefficients, Process

OP = "add_noise"
SHAPES = ((256, 4, 32, 32), (32, 3, 256, 256))
"""A batch of latents and a batch of images; the same everywhere: they take milliseconds on a CPU."""


def random_inputs(i: int, shape: tuple[int, ...], device: str) -> tuple[Coefficients, NoiseKey]:
    """Coefficients at random times and the key of step i."""
    process = Process(schedule="cosine", target="v", weighting="erd").to(device)
    coef = process.coefficients(process.sample_time(shape[0], seed=0, step=i, device=torch.device(device)))
    return coef, NoiseKey(1, i, torch.arange(shape[0], device=device))


def column(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1)."""
    return coefficient.view(-1, *[1] * (like.dim() - 1))


def eager(x0: Tensor, noise: Tensor | None, coef: Coefficients, key: NoiseKey) -> Tensor:
    """As trainers write it."""
    eps = torch.randn_like(x0) if noise is None else noise
    return (column(coef.alpha, x0) * x0 + column(coef.sigma, x0) * eps).to(x0.dtype)


def fused(x0: Tensor, noise: Tensor | None, coef: Coefficients, key: NoiseKey) -> Tensor:
    """The op."""
    return add_noise(x0, coef, key) if noise is None else add_noise(x0, coef, noise=noise)


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Shapes, dtypes, noise drawn or given."""
    for shape in SHAPES:
        for dtype in dtypes:
            for noise in ("drawn", "given"):
                yield make_case(shape, dtype, noise, device)


def make_case(shape: tuple[int, ...], dtype: torch.dtype, noise: str, device: str) -> Case:
    """Reads x0 (and the noise), writes x_t."""

    def make_inputs(i: int) -> tuple:
        x0 = torch.randn(shape, device=device).to(dtype)
        eps = torch.randn(shape, device=device).to(dtype) if noise == "given" else None
        return (x0, eps, *random_inputs(i, shape, device))

    arrays = 3 if noise == "given" else 2
    size, elements = "x".join(map(str, shape)), torch.Size(shape).numel()
    return Case(
        name=f"{size} {str(dtype).removeprefix('torch.')} {noise} noise",
        fields={"shape": list(shape), "dtype": dtype, "noise": noise, "elements": elements},
        make_inputs=make_inputs,
        sides={"eager": eager, "fused": fused},
        passes=("forward",),
        bytes={"forward": arrays * dtype.itemsize * elements},
        backend=backend_of(OP, device, dtype, BACKENDS),
    )


def main() -> None:
    """Measure, print, save."""
    run_cases(OP, cases, __doc__)


if __name__ == "__main__":
    main()
