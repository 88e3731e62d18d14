"""What a training step's options do to its loss and gradients: each beside float32 on the same data, noise and weights.

    python -m bench.step_accuracy --model uvit_h2 --batch 16
    python -m bench.step_accuracy --model dit_xl2 --sides ours_compile ours_fp8

Weights are the network's own first ones and a little noise on top, so that no gradient is zero because a gate still is.
float32 and "plain", which is bf16, run PyTorch's own ops, without a kernel of this package: what kernels add to the
error is what a side has beyond plain. The gradient's error is |g - g32| / |g32| over all parameters together; worst is
the parameter where it is largest, among those that have a thousandth of the gradient or more. Written to
bench/results/<device>/accuracy_<model>_<batch>.json.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.device import default_device, device_name, environment
from bench.harness import RESULTS
from bench.options import at_least
from bench.step_sides import ENVIRONMENT, VARIANTS, StepOptions, trainer, variants
from bench.store import ResultFile, help_text
from erdfast import presets
from erdfast.ops.backend import default_backend
from erdfast.training.trainer import Trainer

OP = "step_accuracy"
EXACT, PLAIN = "float32", "plain"
NOISE = 0.02
"""Standard deviation of what is added to the weights: that of the networks' own first ones."""
NEGLIGIBLE = 1e-3
"""Of the whole gradient's norm: a parameter below is none of which the error is asked."""


class Gradient(NamedTuple):
    """Of one micro-batch."""

    loss: float
    parameters: dict[str, Tensor]
    """float32, on the CPU."""


Make = Callable[[StepOptions, torch.device], Trainer]


def sides(names: Sequence[str]) -> dict[str, Make]:
    """By name, float32 first."""
    plain = {PLAIN: partial(trainer, precision="bf16")} if PLAIN in names else {}
    return {EXACT: partial(trainer, precision="fp32")} | plain | {n: VARIANTS[n] for n in names if n != PLAIN}


def differentiate(make: Make, options: StepOptions, device: torch.device, *, plain: bool = False) -> Gradient:
    """The loss and gradients of the first batch; `plain`: by PyTorch's ops."""
    torch._dynamo.reset()
    torch.manual_seed(0)  # of the data
    step = make(options, device)
    try:
        with default_backend("reference" if plain else None):
            disturb(step.parameters)
            batch = step.loader.batch(0, 0)
            step._step.fill_(0)
            result = step._micro_batch(batch.x, batch.y, step._offsets[0], batch.moments_scale)
            found = {name: p.grad.float().cpu() for name, p in step.parameters.items() if p.grad is not None}
            return Gradient(result.loss.item(), found)
    finally:
        step.loader.close()


@torch.no_grad()
def disturb(parameters: Mapping[str, Tensor]) -> None:
    """Add the same noise in every process and on every device."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        noise = NOISE * torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise.to(parameter.device))


def compare(found: Gradient, exact: Gradient) -> dict[str, Any]:
    """Relative errors.

    Raises:
        ValueError: other parameters have gradients.
    """
    if found.parameters.keys() != exact.parameters.keys():
        differing = sorted(found.parameters.keys() ^ exact.parameters.keys())
        raise ValueError(f"gradients of other parameters than in float32: {', '.join(differing[:5])}")
    squares = {name: float(g.double().square().sum()) for name, g in exact.parameters.items()}
    errors = {name: float((found.parameters[name] - g).double().square().sum()) for name, g in exact.parameters.items()}
    whole = sum(squares.values())
    asked = [name for name in squares if squares[name] >= NEGLIGIBLE**2 * whole]
    worst = max(asked, key=lambda name: errors[name] / squares[name])
    return {
        "loss": found.loss,
        "loss_error": found.loss / exact.loss - 1,
        "gradient_error": (sum(errors.values()) / whole) ** 0.5,
        "worst": worst,
        "worst_error": (errors[worst] / squares[worst]) ** 0.5,
    }


def measure(options: StepOptions, names: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    """A row per side, printed as they come; the first is float32 itself."""
    exact: Gradient | None = None
    rows = []
    for name, make in sides(names).items():
        row: dict[str, Any] = {"case": f"{options.model} batch {options.batch}", "side": name}
        try:
            found = differentiate(make, options, device, plain=name in (EXACT, PLAIN))
            exact = exact or found
            row |= compare(found, exact)
        except Exception as error:
            if exact is None:
                raise
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        rows.append(row)
        print_row(row)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def print_row(row: Mapping[str, Any]) -> None:
    """For people."""
    if "failed" in row:
        print(f"{row['side']:13} not measured: {row['failed']}", flush=True)
        return
    text = f"{row['side']:13} loss {row['loss']:.6f}"
    if row["side"] != EXACT:
        text += f"  its error {row['loss_error']:+.1e}  gradient's error {row['gradient_error']:.1e}"
        text += f"  worst {row['worst_error']:.1e} ({row['worst']})"
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    device = torch.device(default_device())
    choices = [PLAIN, *(name for name in variants(device) if name not in ENVIRONMENT)]
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="dit_b2", choices=list(presets.MODELS), metavar="PRESET")
    parser.add_argument("--batch", type=at_least(1), default=16, help="images; float32 needs twice the memory of bf16")
    parser.add_argument("--sides", nargs="+", default=choices, choices=choices)
    parser.add_argument("--compile", default="block", choices=["block", "full", "max-autotune"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--overwrite", action="store_true", help="let this run replace a full one whatever it lacks")
    parser.add_argument("--no-save", dest="save", action="store_false", help="print only")
    args = parser.parse_args(argv)
    options = StepOptions(model=args.model, batch=args.batch, compile=args.compile)
    path = args.results / device_name() / f"accuracy_{args.model}_{args.batch}.json"
    lacking = [f"side {name}" for name in choices if name not in args.sides]
    try:
        file = ResultFile(path, missing=lacking, overwrite=args.overwrite) if args.save else None
    except ValueError as error:
        parser.error(str(error))
    rows = measure(options, args.sides, device)
    failed = any("failed" in row for row in rows)
    if file is not None:
        print(f"written: {file.write({'op': OP, 'environment': environment()}, rows, finished=not failed)}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
