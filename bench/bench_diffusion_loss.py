"""Noise, loss and its gradient: eager PyTorch, torch.compile, and the fused ops, interleaved in one run.

What is timed is what a training step adds around its network:

    x_t = add_noise(x0)            eager: alpha*x0 + sigma*randn
    loss = weighted MSE(pred, y)   y = c_x*x0 + c_eps*eps
    loss.backward()                the gradient for pred

`python -m bench.bench_diffusion_loss` prints a table and writes bench/results/<device>/diffusion_loss.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness import as_dict, copy_rate, interleave, ratio, save, spread
from erdfast.ops import NoiseKey, add_noise, diffusion_loss
from erdfast.process import Coefficients, Process

SHAPES = ((256, 4, 32, 32), (32, 3, 256, 256))
ROTATION = 4
"""Sets of inputs that the rounds go through."""


class Inputs(NamedTuple):
    """One set."""

    x0: Tensor
    pred: Tensor
    noise: Tensor
    coef: Coefficients
    key: NoiseKey


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Inputs]:
    """Random data only."""
    process = Process(schedule="cosine", target="v", weighting="erd").to(device)
    sets = []
    for i in range(ROTATION):
        x0, pred, noise = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        coef = process.coefficients(process.sample_time(shape[0], seed=0, step=i))
        ids = torch.arange(shape[0], device=device)
        sets.append(Inputs(x0, pred, noise, coef, NoiseKey(1, i, ids)))
    return sets


def noise_and_loss_eager(x0: Tensor, pred: Tensor, noise: Tensor | None, coef: Coefficients) -> tuple[Tensor, Tensor]:
    """(x_t, loss) as trainers write it; with given noise or drawing it."""
    shape = (-1, *[1] * (x0.dim() - 1))
    alpha, sigma, c_x, c_eps = (c.view(shape) for c in coef[:4])
    eps = torch.randn_like(x0) if noise is None else noise
    x_t = alpha * x0 + sigma * eps
    y = c_x * x0 + c_eps * eps
    loss = (coef.w * (pred - y).square().flatten(1).mean(1)).mean()
    return x_t, loss


def sides(sets: list[Inputs], given_noise: bool) -> dict[str, Callable[[int], Any]]:
    """The three implementations, each a function of the round."""
    compiled = torch.compile(noise_and_loss_eager, dynamic=False)

    def plain(function: Callable) -> Callable[[int], Any]:
        def call(i: int) -> Any:
            x0, pred, noise, coef, _ = sets[i % ROTATION]
            leaf = pred.detach().requires_grad_()
            x_t, loss = function(x0, leaf, noise if given_noise else None, coef)
            loss.backward()
            return x_t, leaf.grad

        return call

    def fused(i: int) -> Any:
        x0, pred, noise, coef, key = sets[i % ROTATION]
        leaf = pred.detach().requires_grad_()
        source = {"noise": noise} if given_noise else {"key": key}
        x_t = add_noise(x0, coef, **source)
        diffusion_loss(leaf, x0, coef, **source).backward()
        return x_t, leaf.grad

    return {"eager": plain(noise_and_loss_eager), "compile": plain(compiled), "fused": fused}


def bytes_moved(x0: Tensor, given_noise: bool) -> int:
    """The least traffic: add_noise reads x0 and writes x_t, the loss reads pred and x0 and writes the gradient."""
    return x0.numel() * x0.element_size() * (5 + (2 if given_noise else 0))


def measure(shape: tuple[int, ...], dtype: torch.dtype, device: str, given_noise: bool, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    sets = make_inputs(shape, dtype, device)
    timings = interleave(sides(sets, given_noise), rounds)
    fused = timings["fused"]
    numel = sets[0].x0.numel()
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "noise": "given" if given_noise else "drawn",
        "timings": as_dict(timings),
        "spread": spread(list(timings.values())),
        "fused_million_elements_per_s": numel / fused.p50_ms / 1e3,
        "fused_gb_per_s": bytes_moved(sets[0].x0, given_noise) / fused.p50_ms / 1e6,
        "over_eager": ratio(timings["eager"], fused),
        "over_compile": ratio(timings["compile"], fused),
    }


def print_row(row: dict[str, Any], ceiling: float) -> None:
    """One line for people."""
    eager, compiled = row["over_eager"], row["over_compile"]
    shape = "x".join(map(str, row["shape"]))
    print(
        f"{shape:16} {row['dtype']:9} noise {row['noise']:5}  "
        f"{row['fused_million_elements_per_s']:7,.0f} M elements/s  "
        f"{100e9 * row['fused_gb_per_s'] / ceiling:4.0f}% of the copy rate  "
        f"{eager['median']:5.1f}x eager ({eager['low']:.1f}-{eager['high']:.1f})  "
        f"{compiled['median']:5.1f}x compile ({compiled['low']:.1f}-{compiled['high']:.1f})"
    )


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="timed calls of each side")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ceiling = copy_rate()
    print(f"{device}, {torch.get_num_threads()} threads, copy rate {ceiling / 1e9:.1f} GB/s")
    rows = []
    for shape in SHAPES:
        for dtype in options.dtypes:
            for given_noise in (False, True):
                row = measure(shape, getattr(torch, dtype), device, given_noise, options.rounds)
                row["copy_gb_per_s"] = ceiling / 1e9
                print_row(row, ceiling)
                rows.append(row)
    if not options.no_save:
        print(f"written: {save('diffusion_loss', rows)}")


if __name__ == "__main__":
    main()
