"""What a training step should take on a GPU on which it was not measured. A prediction, not a measurement.

    python -m bench.step_model                                    # the networks of the table in README, H200 and A100
    python -m bench.step_model --model uvit_h2 --device a100      # op by op

Every op takes its least time (bench.roofline: operations over the rate of products, or bytes over the rate of memory,
whichever is longer) over the share of it that a measured GPU reached. That share has two factors, both from
bench/results/<measured>: what large products and copies reach of the data sheet's rates, and what the op's kernel
reaches of those (the median over its measured sizes; where one has exactly the size asked for, on the GPU asked for,
its time is taken instead). Where a kernel multiplies and moves data, as attention does, the rate that another GPU has
less of limits it there. An op without a measurement is given the median share of the ops that memory limits.

Hopeful: until bench.bench_linear has measured products with weights, they are given the rate of one large product,
which those of a network do not quite reach; gaps between kernels, the loader and the exchange of gradients take no
time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.budget import Machine, Work, attention, step_budget
from bench.harness import RESULTS
from bench.options import at_least
from bench.roofline import MACHINES, totals, with_measurements
from bench.store import PARTIAL
from erdfast import presets
from erdfast.models.backbone import Heads
from erdfast.models.flops import training_flops
from erdfast.training.gpus import GPUS

NETWORKS = ("uvit_h2", "dit_xl2", "dit_b2", "lightningdit_xl1", "jit_b16")
"""Of the table in README."""
BATCH = 128
"""Images per step there."""
DEVICES = ("h200", "a100")
MEASURED = "h200"
"""The folder whose results are used."""
PRODUCTS = ("linear", "convolution")
"""The first stands for both."""
MEMORY_BOUND = ("modulated_norm", "gelu", "swiglu", "qk_norm_rope", "adamw_ema")
"""Ops that only move data, whose measured shares stand for others'."""
LIKE_A_STEP: dict[str, Mapping[str, Any]] = {
    "linear": {"dtype": "bfloat16"},
    "diffusion_loss": {"noise": "drawn", "work": "all"},
    "adamw_ema": {"clip": False},
}
"""Of an op's measured rows those that a step is like."""
PUBLISHED = {("uvit_h2", "a100"): 146.0}
"""Images/s: U-ViT's authors, fp16, the same batch; the best that was published for an A100."""


class Uncalibrated(ValueError):
    """What was measured on a device does not suffice."""


class Share(NamedTuple):
    """What an op's kernel reaches of the rates of large products and copies."""

    flops: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Shares that a measured GPU reached."""

    gpu: str
    """A name of GPUS."""
    flops: float
    """Of the data sheet's bf16 rate, by one large product."""
    bytes: float
    """Of the data sheet's memory rate, by a large copy."""
    kernels: Mapping[str, Share]
    """By op."""
    others: float
    """Of ops that were not measured: the median over MEMORY_BOUND."""

    def reached(self, machine: Machine) -> Machine:
        """The rates of large products and copies on another GPU, if it reaches as much of its data sheet."""
        rates = {"flops_per_s": machine.flops_per_s * self.flops, "bytes_per_s": machine.bytes_per_s * self.bytes}
        return replace(machine, **rates, source=f"predicted: {self.flops:.1%} and {self.bytes:.1%} of the data sheet")

    def share(self, work: Work) -> Share:
        """Of the rates reached by large products and copies."""
        if work.op in PRODUCTS:
            return self.kernels.get(PRODUCTS[0], Share(1.0, 1.0))
        return self.kernels.get(work.op, Share(self.others, self.others))

    def milliseconds(self, work: Work, machine: Machine) -> float:
        """What an op takes on a machine whose rates are those of large products and copies."""
        if work.measured_ms is not None:
            return work.measured_ms
        share = self.share(work)
        compute = work.flops / (machine.flops_per_s * share.flops)
        return 1e3 * max(compute, work.fused_bytes / (machine.bytes_per_s * share.bytes))


def gpu_of(folder: Path) -> str | None:
    """The GPU of a folder of results, a name of GPUS: "h100" of "h100_80gb_hbm3"."""
    return next((name for name in GPUS if name in folder.name), None)


def calibrate(folder: Path) -> Calibration:
    """From the results of a device.

    Raises:
        Uncalibrated: its data sheet is not known, or no result has rates of bf16 products and copies and an op of
            MEMORY_BOUND.
        ValueError: a result is damaged; the message names its file.
    """
    gpu = gpu_of(folder)
    if gpu is None:
        raise Uncalibrated(f"no data sheet of {folder.name} is known; known: {', '.join(GPUS)}")
    paths = [path for path in sorted(folder.glob("*.json")) if not path.name.endswith(PARTIAL)]
    rates, kernels = [], {}
    for path in paths:
        try:
            result = json.loads(path.read_text())
            rate = _rates(result)
            if rate is not None:
                rates.append(rate)
                kernels |= _shares(result, *rate)
        except (OSError, LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
            raise ValueError(f"{folder.name}/{path.name} is damaged ({type(error).__name__}: {error})") from error
    moved = [kernels[op].bytes for op in MEMORY_BOUND if op in kernels]
    if not moved:
        raise Uncalibrated(f"{folder.name} has no op that memory limits: run `bash bench/gpu.sh bench_modulated_norm`")
    return Calibration(
        gpu=gpu,
        flops=median(flops for flops, _ in rates) / GPUS[gpu].flops_per_s,
        bytes=median(num_bytes for _, num_bytes in rates) / GPUS[gpu].bytes_per_s,
        kernels=kernels,
        others=median(moved),
    )


def _rates(result: Mapping[str, Any]) -> tuple[float, float] | None:
    """Of large bf16 products and copies, if the result has them."""
    ceilings = result.get("ceilings", {})
    flops = ceilings.get("matmul_flops_per_s", {}).get("bfloat16")
    return None if flops is None else (float(flops), float(ceilings["copy_bytes_per_s"]))


def _shares(result: Mapping[str, Any], flops_per_s: float, bytes_per_s: float) -> dict[str, Share]:
    """An op's share, under its name; nothing of other ops and of results without such rows."""
    op = result["op"]
    if op == "attention":
        found = [(attention(_heads(row), row["fields"]["batch"], 1), _seconds(row)) for row in _whole_passes(result)]
        shares = [Share(w.flops / flops_per_s / s, w.fused_bytes / bytes_per_s / s) for w, s in found]
    elif op in MEMORY_BOUND or op in LIKE_A_STEP:
        rows = [row["share"] for row in _whole_passes(result) if row["share"] is not None]
        shares = [Share(share, share) for share in rows]
    else:
        shares = []
    return {op: Share(median(s.flops for s in shares), median(s.bytes for s in shares))} if shares else {}


def _heads(row: Mapping[str, Any]) -> Heads:
    fields = row["fields"]
    return Heads(fields["heads"], fields["tokens"], fields["width"])


def _seconds(row: Mapping[str, Any]) -> float:
    return 1e-3 * row["timings"][0]["fused"]["p50_ms"]


def _whole_passes(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Forward and backward together, in bf16; of an op without a backward, and so without a dtype, all rows."""
    like = LIKE_A_STEP.get(result["op"], {})
    rows = [row for row in result["rows"] if all(row["fields"].get(name) == value for name, value in like.items())]
    if any(row["pass"] == "both" for row in rows):
        return [row for row in rows if row["pass"] == "both" and row["fields"].get("dtype") == "bfloat16"]
    return [row for row in rows if row["pass"] == "forward"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A predicted step."""

    model: str
    gpu: str
    batch: int
    works: tuple[tuple[Work, float], ...]
    """Each op with its milliseconds."""
    least_ms: float
    """At the rates of large products and copies alone."""

    @property
    def ms(self) -> float:
        return sum(ms for _, ms in self.works)

    @property
    def images_per_s(self) -> float:
        return self.batch / (1e-3 * self.ms)

    @property
    def mfu(self) -> float:
        """Of the data sheet's rate, as everywhere."""
        return self.images_per_s * training_flops(presets.model_config(self.model)) / GPUS[self.gpu].flops_per_s

    def part(self, *ops: str) -> float:
        """The share of these ops of the step's time."""
        return sum(ms for work, ms in self.works if work.op in ops) / self.ms


def predict(model: str, gpu: str, batch: int, calibration: Calibration, folder: Path) -> Step:
    """A step of a preset on one of GPUS; `folder`: the results that `calibration` was made from."""
    machine = calibration.reached(MACHINES[gpu])
    budget = step_budget(presets.model_config(model), batch)
    if gpu == calibration.gpu:
        budget = with_measurements(budget, folder)
    works = tuple((work, calibration.milliseconds(work, machine)) for work in budget)
    return Step(model=model, gpu=gpu, batch=batch, works=works, least_ms=totals(budget, machine)[1])


# ---------------------------------------------------------------------------- output


def table(folder: Path) -> str:
    """The table in README, from the results of a device.

    Raises:
        ValueError: they do not suffice, or are damaged.
    """
    calibration = calibrate(folder)
    lines = [
        "| network | GPU | predicted images/s | MFU | products | attention | at most | published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in NETWORKS:
        for gpu in DEVICES:
            step = predict(model, gpu, BATCH, calibration, folder)
            published = PUBLISHED.get((model, gpu))
            lines.append(
                f"| {model} | {gpu.upper()} | {step.images_per_s:,.0f} | {step.mfu:.0%} | {step.part('linear'):.0%} "
                f"| {step.part('attention'):.0%} | {BATCH / (1e-3 * step.least_ms):,.0f} "
                f"| {'' if published is None else f'{published:,.0f}'} |"
            )
    kernels = ", ".join(f"{op} {max(share):.0%}" for op, share in sorted(calibration.kernels.items()))
    lines += [
        "",
        f"Predicted by bench/step_model.py, measured nowhere: {BATCH} images a step on one GPU, bf16. On the "
        f"{calibration.gpu.upper()} large products reach {calibration.flops:.0%} of the data sheet and copies "
        f"{calibration.bytes:.0%}, and kernels of these: {kernels}; others are taken for {calibration.others:.0%}. "
        "Products, attention: their shares of the step. At most: were every kernel as good as a large product or copy. "
        "Published: by U-ViT's authors, in fp16.",
    ]
    return "\n".join(lines) + "\n"


def render(step: Step, calibration: Calibration) -> str:
    """The ops of a step, longest first."""
    lines = [
        f"{step.model} on {step.gpu}, batch {step.batch}, bf16: PREDICTED from results on {calibration.gpu}",
        "",
        f"{'op':15} {'':30} {'count':>5} {'ms':>9} {'of step':>8}  from",
    ]
    for work, ms in sorted(step.works, key=lambda pair: -pair[1]):
        source = _source(work, calibration)
        lines.append(f"{work.op:15} {work.detail:30} {work.count:5} {ms:9.3f} {ms / step.ms:8.1%}  {source}")
    lines += ["", f"{step.ms:.1f} ms a step, {step.images_per_s:,.0f} images/s, MFU {step.mfu:.1%}"]
    return "\n".join(lines)


def _source(work: Work, calibration: Calibration) -> str:
    if work.measured_ms is not None:
        return "measured"
    share = calibration.share(work)
    if work.op in PRODUCTS and PRODUCTS[0] in calibration.kernels:
        return f"{share.flops:.0%} of products, as Linears were measured at other sizes"
    if work.op in calibration.kernels:
        products = f"{share.flops:.0%} of products, " if work.flops else ""
        return f"{products}{share.bytes:.0%} of copies, as measured at other sizes"
    if work.flops:
        return "the rate of a large product"
    return f"{share.bytes:.0%} of copies, as measured ops that memory limits"


def main(argv: Sequence[str] | None = None) -> None:
    """Print a prediction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(presets.MODELS), metavar="PRESET", help="without it: README's table")
    parser.add_argument("--device", default="a100", choices=list(GPUS))
    parser.add_argument("--batch", type=at_least(1), default=BATCH, help="images per step")
    options = parser.parse_args(argv)
    folder = RESULTS / MEASURED
    if options.model is None:
        print(table(folder), end="")
        return
    calibration = calibrate(folder)
    print(render(predict(options.model, options.device, options.batch, calibration, folder), calibration))


if __name__ == "__main__":
    main()
