"""Noise, loss and its gradient: the fused ops beside eager PyTorch and torch.compile.

    loss = weighted MSE(pred, y), y = c_x*x0 + c_eps*eps; loss.backward()     work "loss"
    the same after x_t = alpha*x0 + sigma*eps                                 work "all": all around the network

Forward and backward are timed as one, because the fused loss computes its gradient in the forward pass. Noise is
computed ("drawn"; eager draws it once for both) or given. `python -m bench.bench_diffusion_loss` prints a table and
writes bench/results/<device>/diffusion_loss.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.bench_add_noise import SHAPES, column, random_inputs
from bench.harness import Case, backend_of, run_cases
from erdfast.ops import NoiseKey, add_noise, diffusion_loss
from erdfast.ops.backend import BACKENDS
from erdfast.process import Coefficients

OP = "diffusion_loss"


def eager(
    pred: Tensor, x0: Tensor, noise: Tensor | None, coef: Coefficients, key: NoiseKey, *, work: str
) -> tuple[Tensor | None, Tensor]:
    """(x_t, loss) as trainers write it."""
    alpha, sigma, c_x, c_eps = (column(c, x0) for c in coef[:4])
    eps = torch.randn_like(x0) if noise is None else noise
    x_t = (alpha * x0 + sigma * eps).to(x0.dtype) if work == "all" else None
    y = c_x * x0 + c_eps * eps
    return x_t, (coef.w * (pred - y).square().flatten(1).mean(1)).mean()


def fused(
    pred: Tensor, x0: Tensor, noise: Tensor | None, coef: Coefficients, key: NoiseKey, *, work: str
) -> tuple[Tensor | None, Tensor]:
    """The same through the ops."""
    source: dict[str, Any] = {"key": key} if noise is None else {"noise": noise}
    x_t = add_noise(x0, coef, **source) if work == "all" else None
    return x_t, diffusion_loss(pred, x0, coef, **source)


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Shapes, dtypes, noise drawn or given, the loss alone or with add_noise."""
    for shape in SHAPES:
        for dtype in dtypes:
            for noise in ("drawn", "given"):
                for work in ("loss", "all"):
                    yield make_case(shape, dtype, noise, work, device)


def make_case(shape: tuple[int, ...], dtype: torch.dtype, noise: str, work: str, device: str) -> Case:
    """The loss reads pred and x0 and writes the gradient; add_noise reads x0 and writes x_t; each reads given noise."""

    def make_inputs(i: int) -> tuple:
        x0, pred = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        eps = torch.randn(shape, device=device).to(dtype) if noise == "given" else None
        return (pred.requires_grad_(), x0, eps, *random_inputs(i, shape, device))

    arrays = {"loss": 3, "all": 5}[work]
    draws = {"loss": 1, "all": 2}[work] if noise == "given" else 0
    size, elements = "x".join(map(str, shape)), torch.Size(shape).numel()
    return Case(
        name=f"{size} {str(dtype).removeprefix('torch.')} {noise} noise {work}",
        fields={"shape": list(shape), "dtype": dtype, "noise": noise, "work": work, "elements": elements},
        make_inputs=make_inputs,
        sides={"eager": partial(eager, work=work), "fused": partial(fused, work=work)},
        passes=("both",),
        bytes={"both": (arrays + draws) * dtype.itemsize * elements},
        backend=backend_of(OP, device, dtype, BACKENDS),
    )


def main() -> None:
    """Measure, print, save."""
    run_cases(OP, cases, __doc__)


if __name__ == "__main__":
    main()
