"""Where the time of a training step must go: operations, bytes and least times, op by op, for any preset.

    python -m bench.roofline --model uvit_h2 --device h200 --batch 128

Counted is one step on one device under bf16 autocast: float32 weights and residual stream, bf16 matrix products. An
op's least time is the longer of operations over the matrix rate and bytes over the memory rate; a step's is their sum.
Bytes are given twice: with this package's fusions, each tensor moved once per op, and as eager PyTorch moves them,
kernel by kernel. Operations of matrix products and attention add up to erdfast.models.flops (which also counts U-ViT's
first and last Linear for every token). Where bench/results has a measurement of an op at exactly this size, it stands
beside it.

Machines: a100, h100 and h200 are the figures of their data sheets. h200_measured has the rates of large products and
copies that were measured beside the results in bench/results/h200. cpu is this machine, by its committed ceilings or
measured now.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.budget import Machine, Work, step_budget
from bench.device import Ceilings, device_name, measure_ceilings
from bench.harness import RESULTS
from bench.options import at_least
from erdfast import presets
from erdfast.models import BackboneConfig
from erdfast.models.flops import training_flops
from erdfast.training.gpus import GPUS

# fmt: off
MACHINES = {machine.name: machine for machine in (
    *(Machine(name=gpu.name, flops_per_s=gpu.flops_per_s, bytes_per_s=gpu.bytes_per_s, source=source)
      for gpu, source in ((GPUS["a100"], "data sheet, 80 GB SXM"), (GPUS["h100"], "data sheet, SXM"),
                          (GPUS["h200"], "data sheet"))),
    Machine(name="h200_measured", flops_per_s=795e12, bytes_per_s=4.25e12,
            source="measured: the ceilings in bench/results/h200"),
)}
# fmt: on


def totals(budget: Sequence[Work], machine: Machine) -> tuple[int, float, float]:
    """(operations, least milliseconds with our fusions, least milliseconds eager)."""
    fused = sum(work.floor_ms(machine) for work in budget)
    eager = sum(work.floor_ms(machine, fused=False) for work in budget)
    return sum(work.flops for work in budget), fused, eager


# ---------------------------------------------------------------------------- measurements


def with_measurements(budget: Sequence[Work], folder: Path) -> list[Work]:
    """Put beside each op what the results of a device say about exactly its size, forward and backward together."""
    return [replace(work, measured_ms=_measured(work, folder)) for work in budget]


def _measured(work: Work, folder: Path) -> float | None:
    path = folder / f"{work.op}.json"
    if work.fields is None or not path.exists():
        return None
    rows = [
        row
        for row in json.loads(path.read_text())["rows"]
        if all(row["fields"].get(name) == value for name, value in work.fields.items())
    ]
    passes = {row["pass"]: row for row in rows}
    row = passes.get("both") or (passes.get("forward") if len(passes) == 1 else None)  # an update has no backward
    return None if row is None else work.count * row["timings"][0]["fused"]["p50_ms"]


def results_folder(device: str) -> Path | None:
    """bench/results/<device> of a machine in the table, if there is one: "nvidia h200" has "h200" in its name."""
    name = device.removesuffix("_measured")
    return next((path for path in sorted(RESULTS.iterdir()) if path.is_dir() and name in path.name), None)


def this_cpu() -> Machine:
    """This machine by its committed ceilings; measured now where there are none."""
    folder = RESULTS / device_name()
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))] if folder.exists() else []
    ceilings = [Ceilings(**result["ceilings"]) for result in found if "ceilings" in result]
    known = next((c for c in ceilings if "bfloat16" in c.matmul_flops_per_s), None) or measure_ceilings("cpu")
    rate = max(known.matmul_flops_per_s.values())
    return Machine(name="cpu", flops_per_s=rate, bytes_per_s=known.copy_bytes_per_s, source="measured")


# ---------------------------------------------------------------------------- output


def render(config: BackboneConfig, batch: int, machine: Machine, budget: Sequence[Work]) -> str:
    """The table as text."""
    peak, memory = machine.flops_per_s / 1e12, machine.bytes_per_s / 1e12
    lines = [
        f"{machine.name}: {peak:.3g} TFLOP/s, {memory:.3g} TB/s; batch {batch}, bf16 autocast",
        f"({machine.source})",
        "",
        f"{'op':15} {'':30} {'count':>5} {'GFLOP':>9} {'MB':>9} {'MB eager':>9} {'floor ms':>9} {'eager':>9} "
        f"{'bound':>8} {'measured':>9}",
    ]
    for work in sorted(budget, key=lambda work: -work.floor_ms(machine)):
        measured = "" if work.measured_ms is None else f"{work.measured_ms:9.3f}"
        lines.append(
            f"{work.op:15} {work.detail:30} {work.count:5} {work.flops / 1e9:9,.1f} {work.fused_bytes / 1e6:9,.1f} "
            f"{work.eager_bytes / 1e6:9,.1f} {work.floor_ms(machine):9.3f} {work.floor_ms(machine, fused=False):9.3f} "
            f"{work.bound(machine):>8} {measured:>9}"
        )
    flops, fused, eager = totals(budget, machine)
    model = batch * training_flops(config)
    lines += ["", f"{flops / 1e9:,.0f} GFLOP per step ({training_flops(config) / 1e9:,.1f} per image)"]
    for name, ms in (("with our fusions", fused), ("eager", eager)):
        mfu = model / machine.flops_per_s / (1e-3 * ms)
        lines.append(f"{name:17} {ms:9.2f} ms a step, {batch / (1e-3 * ms):,.0f} images/s, MFU {mfu:.1%} at most")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the budget of a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="uvit_h2", choices=list(presets.MODELS), metavar="PRESET")
    parser.add_argument("--device", default="h200", choices=[*MACHINES, "cpu"])
    parser.add_argument("--batch", type=at_least(1), default=128, help="images per step")
    options = parser.parse_args(argv)
    machine = this_cpu() if options.device == "cpu" else MACHINES[options.device]
    folder = RESULTS / device_name() if options.device == "cpu" else results_folder(options.device)
    config = presets.model_config(options.model)
    budget = step_budget(config, options.batch)
    if folder is not None:
        budget = with_measurements(budget, folder)
    print(f"{options.model} on {render(config, options.batch, machine, budget)}")


if __name__ == "__main__":
    main()
