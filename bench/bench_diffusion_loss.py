"""Noise, loss and its gradient: the fused ops beside eager PyTorch and beside torch.compile, interleaved, in one run.

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

from bench.harness import Timing, as_dict, copy_rate, interleave, ratio, save, spread
from erdfast.ops import NoiseKey, add_noise, diffusion_loss
from erdfast.process import Coefficients, Process

SHAPES = ((256, 4, 32, 32), (32, 3, 256, 256))
WORK = ("add_noise", "loss", "both")
"""`loss` is noise, loss and its gradient; `both` is all that a training step adds around its network."""
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


def eager(
    x0: Tensor, pred: Tensor, noise: Tensor | None, coef: Coefficients, work: str
) -> tuple[Tensor | None, Tensor | None]:
    """(x_t, loss) as trainers write it; with given noise or drawing it."""
    shape = (-1, *[1] * (x0.dim() - 1))
    alpha, sigma, c_x, c_eps = (c.view(shape) for c in coef[:4])
    eps = torch.randn_like(x0) if noise is None else noise
    x_t = loss = None
    if work != "loss":
        x_t = alpha * x0 + sigma * eps
    if work != "add_noise":
        y = c_x * x0 + c_eps * eps
        loss = (coef.w * (pred - y).square().flatten(1).mean(1)).mean()
    return x_t, loss


def fused(
    x0: Tensor, pred: Tensor, source: dict[str, Any], coef: Coefficients, work: str
) -> tuple[Tensor | None, Tensor | None]:
    """The same through the two ops."""
    x_t = add_noise(x0, coef, **source) if work != "loss" else None
    loss = diffusion_loss(pred, x0, coef, **source) if work != "add_noise" else None
    return x_t, loss


def sides(sets: list[Inputs], given_noise: bool, work: str) -> dict[str, Callable[[int], Any]]:
    """The three implementations, each a function of the round; the loss comes with its backward pass."""
    torch._dynamo.reset()  # each row compiles its own
    compiled = torch.compile(eager, dynamic=False)

    def side(function: Callable, is_fused: bool) -> Callable[[int], Any]:
        def call(i: int) -> Any:
            x0, pred, noise, coef, key = sets[i % ROTATION]
            leaf = pred.detach().requires_grad_()
            source: Any = noise if given_noise else None
            if is_fused:
                source = {"noise": noise} if given_noise else {"key": key}
            x_t, loss = function(x0, leaf, source, coef, work)
            if loss is not None:
                loss.backward()
            return x_t, leaf.grad

        return call

    return {"eager": side(eager, False), "compile": side(compiled, False), "fused": side(fused, True)}


def bytes_moved(x0: Tensor, given_noise: bool, work: str) -> int:
    """The least traffic: add_noise reads x0 and writes x_t, the loss reads pred and x0 and writes the gradient."""
    arrays = {"add_noise": 2, "loss": 3, "both": 5}[work]
    draws = {"add_noise": 1, "loss": 1, "both": 2}[work]
    return x0.numel() * x0.element_size() * (arrays + (draws if given_noise else 0))


class Case(NamedTuple):
    """What a row of the table measures."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    given_noise: bool
    work: str


def measure(case: Case, other: str, device: str, rounds: int) -> dict[str, Timing]:
    """The fused ops and one other side, interleaved."""
    sets = make_inputs(case.shape, case.dtype, device)
    both = sides(sets, case.given_noise, case.work)
    return interleave({other: both[other], "fused": both["fused"]}, rounds)


def make_row(case: Case, eager: dict[str, Timing], compiled: dict[str, Timing], ceiling: float) -> dict[str, Any]:
    """One row of the table."""
    x0 = torch.empty(case.shape, dtype=case.dtype, device="meta")
    fused = eager["fused"]
    return {
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "work": case.work,
        "noise": "given" if case.given_noise else "drawn",
        "timings": {"beside_eager": as_dict(eager), "beside_compile": as_dict(compiled)},
        "spread": spread([*eager.values(), *compiled.values()]),
        "fused_million_elements_per_s": x0.numel() / fused.p50_ms / 1e3,
        "fused_gb_per_s": bytes_moved(x0, case.given_noise, case.work) / fused.p50_ms / 1e6,
        "copy_gb_per_s": ceiling / 1e9,
        "over_eager": ratio(eager["eager"], fused),
        "over_compile": ratio(compiled["compile"], compiled["fused"]),
    }


def print_row(row: dict[str, Any], ceiling: float) -> None:
    """One line for people."""
    eager, compiled = row["over_eager"], row["over_compile"]
    shape = "x".join(map(str, row["shape"]))
    print(
        f"{row['work']:9} {shape:13} {row['dtype']:8} noise {row['noise']:5} "
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
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=WORK, help="which parts")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ceiling = copy_rate()
    print(f"{device}, {torch.get_num_threads()} threads, copy rate {ceiling / 1e9:.1f} GB/s")
    cases = [
        Case(shape, getattr(torch, dtype), given_noise, work)
        for shape in SHAPES
        for dtype in options.dtypes
        for given_noise in (False, True)
        for work in options.work
    ]
    # All of eager first: what the compiler allocates teaches glibc to keep memory, which plain eager code lacks.
    beside_eager = [measure(case, "eager", device, options.rounds) for case in cases]
    beside_compile = [measure(case, "compile", device, options.rounds) for case in cases]
    rows = [make_row(*row, ceiling) for row in zip(cases, beside_eager, beside_compile, strict=True)]
    for row in rows:
        print_row(row, ceiling)
    if not options.no_save:
        print(f"written: {save('diffusion_loss', rows)}")


if __name__ == "__main__":
    main()
