"""What a training step should take on a GPU on which it was not measured. A prediction, not a measurement.

    python -m bench.step_model                                    # the networks of the table in README, H200 and A100
    python -m bench.step_model --model uvit_h2 --device a100      # op by op

Every op takes its least time (bench.roofline: operations over the rate of products, bytes over the rate of memory)
over the share of it that a measured GPU reached. That share has two factors, both from bench/results/<measured>: what
large products and copies reach of the data sheet's rates, and what the op's kernel reaches of those (the median over
its measured sizes; where one has exactly the size asked for, on the GPU asked for, its time is taken instead). An op
without a measurement is given the share of the measured kernels that memory limits. Products with weights are given
the rate of one large product, which those of a network do not quite reach; gaps between kernels, the loader and the
exchange of gradients take no time. Both make the prediction a hopeful one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.budget import Machine, Work, step_budget
from bench.harness import RESULTS
from bench.options import at_least
from bench.roofline import MACHINES, totals, with_measurements
from erdfast import presets
from erdfast.models.flops import training_flops

NETWORKS = ("uvit_h2", "dit_xl2", "dit_b2", "lightningdit_xl1", "jit_b16")
"""Of the table in README."""
BATCH = 128
"""Images per step there."""
DEVICES = ("h200", "a100")
MEASURED = "h200"
"""The GPU whose results are used."""
USED: dict[str, Mapping[str, Any]] = {"diffusion_loss": {"noise": "drawn", "work": "all"}, "adamw_ema": {"clip": False}}
"""Of an op's measured rows those that a step is like."""
PUBLISHED = {("uvit_h2", "a100"): 146.0}
"""Images/s: U-ViT's authors, fp16, the same batch; the best that was published for an A100."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Shares that a measured GPU reached."""

    device: str
    flops: float
    """Of the data sheet's bf16 rate, by one large product."""
    bytes: float
    """Of the data sheet's memory rate, by a large copy."""
    kernels: Mapping[str, float]
    """Of these two, whichever limits, by an op's kernel."""
    memory: float
    """The same for ops that were not measured: the median over the measured kernels that memory limits."""

    def reached(self, machine: Machine) -> Machine:
        """The rates of large products and copies on another GPU, if it reaches as much of its data sheet."""
        rates = {"flops_per_s": machine.flops_per_s * self.flops, "bytes_per_s": machine.bytes_per_s * self.bytes}
        return replace(machine, **rates, source=f"predicted: {self.flops:.1%} and {self.bytes:.1%} of the data sheet")

    def share(self, work: Work) -> float:
        """Of the rates reached by large products and copies."""
        if work.op in ("linear", "convolution"):
            return 1.0
        return self.kernels.get(work.op, self.memory)


def calibrate(device: str, folder: Path) -> Calibration:
    """From the results of a device of MACHINES.

    Raises:
        ValueError: the device is not in MACHINES, or no result there has the rates of bf16 products and of copies and
            an op that memory limits.
    """
    if device not in MACHINES:
        raise ValueError(f"no data sheet of {device} is known; known: {', '.join(MACHINES)}")
    sheet = MACHINES[device]
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [result for result in found if "bfloat16" in result.get("ceilings", {}).get("matmul_flops_per_s", {})]
    kernels, memory = {}, []
    for result in found:
        rows = [row for row in _whole_passes(result) if row["share"] is not None]
        if rows:
            kernels[result["op"]] = median(row["share"] for row in rows)
        if result["op"] != "diffusion_loss":  # bound by the arithmetic of its random numbers
            memory += [row["share"] for row in rows if not row["flops"]]
    if not memory:
        raise ValueError(f"{folder.name} has no measured op that memory limits: run `sh bench/gpu.sh ops` there")
    return Calibration(
        device=device,
        flops=median(r["ceilings"]["matmul_flops_per_s"]["bfloat16"] for r in found) / sheet.flops_per_s,
        bytes=median(r["ceilings"]["copy_bytes_per_s"] for r in found) / sheet.bytes_per_s,
        kernels=kernels,
        memory=median(memory),
    )


def _whole_passes(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Forward and backward together, in bf16; of an op without a backward all rows."""
    like = USED.get(result["op"], {})
    rows = [row for row in result["rows"] if all(row["fields"].get(name) == value for name, value in like.items())]
    both = [row for row in rows if row["pass"] == "both" and row["fields"].get("dtype") == "bfloat16"]
    return both or [row for row in rows if row["pass"] == "forward"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A predicted step."""

    model: str
    device: str
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
        return self.images_per_s * training_flops(presets.model_config(self.model)) / MACHINES[self.device].flops_per_s

    def part(self, *ops: str) -> float:
        """The share of these ops of the step's time."""
        return sum(ms for work, ms in self.works if work.op in ops) / self.ms


def predict(model: str, device: str, batch: int, calibration: Calibration, folder: Path) -> Step:
    """A step of a preset on a device of MACHINES; `folder`: the results that `calibration` was made from."""
    machine = calibration.reached(MACHINES[device])
    budget = step_budget(presets.model_config(model), batch)
    if device == calibration.device:
        budget = with_measurements(budget, folder)
    works = tuple((work, _milliseconds(work, machine, calibration)) for work in budget)
    return Step(model=model, device=device, batch=batch, works=works, least_ms=totals(budget, machine)[1])


def _milliseconds(work: Work, machine: Machine, calibration: Calibration) -> float:
    return work.floor_ms(machine) / calibration.share(work) if work.measured_ms is None else work.measured_ms


# ---------------------------------------------------------------------------- output


def table(folder: Path) -> str:
    """The table in README, from the results in a folder with a name of MACHINES."""
    calibration = calibrate(folder.name, folder)
    lines = [
        "| network | GPU | predicted images/s | MFU | products | attention | at most | published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in NETWORKS:
        for device in DEVICES:
            step = predict(model, device, BATCH, calibration, folder)
            published = PUBLISHED.get((model, device))
            lines.append(
                f"| {model} | {device.upper()} | {step.images_per_s:,.0f} | {step.mfu:.0%} | {step.part('linear'):.0%} "
                f"| {step.part('attention'):.0%} | {BATCH / (1e-3 * step.least_ms):,.0f} "
                f"| {'' if published is None else f'{published:,.0f}'} |"
            )
    kernels = ", ".join(f"{op} {share:.0%}" for op, share in sorted(calibration.kernels.items()))
    lines += [
        "",
        f"Predicted by bench/step_model.py, measured nowhere: {BATCH} images a step on one GPU, bf16. On the "
        f"{folder.name.upper()} large products reach {calibration.flops:.0%} of the data sheet and copies "
        f"{calibration.bytes:.0%}, and kernels of these: {kernels}; others are taken for {calibration.memory:.0%}. "
        "Products, attention: their shares of the step. At most: were every kernel as good as a large product or copy.",
    ]
    return "\n".join(lines) + "\n"


def render(step: Step, calibration: Calibration) -> str:
    """The ops of a step, longest first."""
    lines = [
        f"{step.model} on {step.device}, batch {step.batch}, bf16: PREDICTED from results on {calibration.device}",
        "",
        f"{'op':15} {'':30} {'count':>5} {'ms':>9} {'of step':>8}  from",
    ]
    for work, ms in sorted(step.works, key=lambda pair: -pair[1]):
        known = f"{calibration.share(work):.0%} of {calibration.device}'s rates"
        source = "measured" if work.measured_ms is not None else known
        if work.measured_ms is None and calibration.share(work) == calibration.memory:
            source += ", as measured kernels that memory limits"
        lines.append(f"{work.op:15} {work.detail:30} {work.count:5} {ms:9.3f} {ms / step.ms:8.1%}  {source}")
    lines += ["", f"{step.ms:.1f} ms a step, {step.images_per_s:,.0f} images/s, MFU {step.mfu:.1%}"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a prediction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(presets.MODELS), metavar="PRESET", help="without it: README's table")
    parser.add_argument("--device", default="a100", choices=["a100", "h100", "h200"])
    parser.add_argument("--batch", type=at_least(1), default=BATCH, help="images per step")
    options = parser.parse_args(argv)
    folder = RESULTS / MEASURED
    if options.model is None:
        print(table(folder), end="")
        return
    calibration = calibrate(MEASURED, folder)
    print(render(predict(options.model, options.device, options.batch, calibration, folder), calibration))


if __name__ == "__main__":
    main()
