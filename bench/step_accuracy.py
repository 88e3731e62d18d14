"""What a training step's options do to its loss and gradients: each beside float32 on the same data, noise and weights.

    python -m bench.step_accuracy --model uvit_h2 --batch 16
    python -m bench.step_accuracy --model dit_xl2 --sides plain ours_compile ours_fp8

Weights are the network's own first ones and a little noise on top, so that no gradient is zero because a gate still is.
float32 and "plain", which is bf16, run PyTorch's own ops, without a kernel of this package: what kernels add to the
error is what a side has beyond plain. All but float32 are bf16, and ours_fp8 has float8 products. The gradient's error
is |g - g32| / |g32| over all parameters together; worst is the parameter where it is largest, among those that have a
thousandth of the gradient or more. Written to bench/results/<device>/accuracy_<model>_<batch>.json as rows come in.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.device import default_device, device_name, environment
from bench.harness import RESULTS
from bench.options import at_least
from bench.step_sides import DEFAULT_COMPILE, ENVIRONMENT, VARIANTS, StepOptions, trainer
from bench.store import ResultFile, help_text, one_line
from erdfast import presets
from erdfast.evaluation.inception import full_precision
from erdfast.ops.backend import default_backend
from erdfast.ops.fp8_linear import fp8_reason
from erdfast.training.trainer import Trainer

OP = "step_accuracy"
EXACT, PLAIN = "float32", "plain"
NOISE = 0.02
"""Standard deviation of what is added to the weights, which is about that of the networks' own first ones."""
NEGLIGIBLE = 1e-3
"""Of the whole gradient's norm: a parameter below is none of which the error is asked."""


class Gradient(NamedTuple):
    """Of one micro-batch."""

    precision: str
    loss: float
    parameters: dict[str, Tensor]
    """float32, on the CPU."""


Make = Callable[[StepOptions, torch.device], Trainer]
SIDES: dict[str, Make] = {
    PLAIN: partial(trainer, compiled="none", precision="bf16"),
    **{
        name: make if name == "ours_fp8" else partial(make, precision="bf16")
        for name, make in VARIANTS.items()
        if name not in ENVIRONMENT  # which only shares out memory otherwise
    },
}


def default_sides(device: torch.device) -> list[str]:
    """Those that a device can run."""
    lacking = {"ours_graph"} if device.type == "cpu" else set()
    return [name for name in SIDES if name not in lacking and (name != "ours_fp8" or fp8_reason(device) is None)]


def differentiate(make: Make, options: StepOptions, device: torch.device, *, plain: bool) -> Gradient:
    """The loss and gradients of the first batch; `plain`: by PyTorch's ops."""
    torch._dynamo.reset()
    torch.manual_seed(0)  # of the data
    step = make(options, device)
    try:
        with full_precision(), default_backend("reference" if plain else None):
            disturb(step.parameters)
            batch = step.loader.batch(0, 0)
            result = step._micro_batch(batch.x, batch.y, step._offsets[0], batch.moments_scale)
            found = {name: p.grad.float().cpu() for name, p in step.parameters.items() if p.grad is not None}
            return Gradient(step.precision.name, result.loss.item(), found)
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
        ValueError: other parameters have gradients, or something is not finite, or there is nothing to compare with.
    """
    if found.parameters.keys() != exact.parameters.keys():
        differing = sorted(found.parameters.keys() ^ exact.parameters.keys())
        raise ValueError(f"gradients of other parameters than in float32: {', '.join(differing[:5])}")
    broken = [name for name, gradient in found.parameters.items() if not gradient.isfinite().all()]
    if broken or not math.isfinite(found.loss):
        raise ValueError(f"not finite: {', '.join(broken[:5]) or 'the loss'}")
    squares = {name: float(g.double().square().sum()) for name, g in exact.parameters.items()}
    errors = {name: float((found.parameters[name] - g).double().square().sum()) for name, g in exact.parameters.items()}
    whole = sum(squares.values())
    if whole == 0 or exact.loss == 0:
        raise ValueError("the loss or all gradients are 0 in float32: there is no relative error")
    asked = [name for name in squares if squares[name] >= NEGLIGIBLE**2 * whole]
    worst = max(asked, key=lambda name: errors[name] / squares[name])
    return {
        "precision": found.precision,
        "loss": found.loss,
        "loss_error": found.loss / exact.loss - 1,
        "gradient_error": (sum(errors.values()) / whole) ** 0.5,
        "worst": worst,
        "worst_error": (errors[worst] / squares[worst]) ** 0.5,
    }


def measure(options: StepOptions, names: Sequence[str], device: torch.device) -> Iterator[dict[str, Any]]:
    """A row per side, float32 itself first; without it, there are no others."""
    exact = differentiate(partial(trainer, compiled="none", precision="fp32"), options, device, plain=True)
    case = {"case": f"{options.model} batch {options.batch}"}
    yield {**case, "side": EXACT, **compare(exact, exact)}
    for name in names:
        try:
            row = compare(differentiate(SIDES[name], options, device, plain=name == PLAIN), exact)
        except Exception as error:
            row = {"failed": one_line(error)}
        yield {**case, "side": name, **row}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def print_row(row: Mapping[str, Any]) -> None:
    """For people."""
    if "failed" in row:
        print(f"{row['side']:13} not measured: {row['failed']}", flush=True)
        return
    text = f"{row['side']:13} {row['precision']} loss {row['loss']:.6f}"
    if row["side"] != EXACT:
        text += f"  its error {row['loss_error']:+.1e}  gradient's error {row['gradient_error']:.1e}"
        text += f"  worst {row['worst_error']:.1e} ({row['worst']})"
    print(text, flush=True)


def parse(argv: Sequence[str] | None, device: torch.device) -> tuple[argparse.Namespace, ResultFile | None]:
    """Options, and where rows go."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="dit_b2", choices=list(presets.MODELS), metavar="PRESET")
    parser.add_argument("--batch", type=at_least(1), default=16, help="images (%(default)s)")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), help="by default all that this device can run")
    parser.add_argument("--compile", default=DEFAULT_COMPILE, choices=["block", "full", "max-autotune"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--overwrite", action="store_true", help="let this run replace a full one whatever it lacks")
    parser.add_argument("--no-save", dest="save", action="store_false", help="print only")
    args = parser.parse_args(argv)
    args.sides = list(dict.fromkeys(args.sides or default_sides(device)))
    lacking = [f"side {name}" for name in default_sides(device) if name not in args.sides]
    lacking += [f"compile {DEFAULT_COMPILE}"] if args.compile != DEFAULT_COMPILE else []
    path = args.results / device_name() / f"accuracy_{args.model}_{args.batch}.json"
    try:
        return args, ResultFile(path, missing=lacking, overwrite=args.overwrite) if args.save else None
    except ValueError as error:
        parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    device = torch.device(default_device())
    args, file = parse(argv, device)
    options = StepOptions(model=args.model, batch=args.batch, compile=args.compile, samples=args.batch)
    head = {"op": OP, "environment": environment(), "compile": args.compile}
    rows: list[dict[str, Any]] = []
    for row in measure(options, args.sides, device):
        rows.append(row)
        print_row(row)
        if file is not None:
            file.write(head, rows, finished=False)
    failed = any("failed" in row for row in rows)
    if file is not None:
        print(f"written: {file.write(head, rows, finished=not failed)}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
