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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.device import Ceilings, device_name, measure_ceilings
from bench.harness import RESULTS
from bench.options import at_least
from erdfast import presets
from erdfast.models import BackboneConfig, DiTConfig, TransformerConfig, UViTConfig
from erdfast.models.dit import TIME_FEATURES
from erdfast.models.flops import parameter_count, training_flops
from erdfast.training.gpus import GPUS

LOW = 2
"""Bytes of a bf16 number."""
BF16 = {"dtype": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a device can do at most."""

    name: str
    flops_per_s: float
    """Dense bf16 products."""
    bytes_per_s: float
    """Memory, read and written."""
    source: str
    """Where the two come from."""


# fmt: off
MACHINES = {machine.name: machine for machine in (
    *(Machine(name=gpu.name, flops_per_s=gpu.flops_per_s, bytes_per_s=gpu.bytes_per_s, source=source)
      for gpu, source in ((GPUS["a100"], "data sheet, 80 GB SXM"), (GPUS["h100"], "data sheet, SXM"),
                          (GPUS["h200"], "data sheet"))),
    Machine(name="h200_measured", flops_per_s=795e12, bytes_per_s=4.25e12,
            source="measured: the ceilings in bench/results/h200"),
)}
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Work:
    """One kind of op of a step, at one size."""

    op: str
    """Of this package where it has one; "linear" for a product with weights."""
    detail: str
    count: int
    """Times per step; the rest is for all of them together."""
    flops: int = 0
    """Of matrix products."""
    fused_bytes: int
    eager_bytes: int
    fields: Mapping[str, Any] | None = None
    """By which a measurement is found: the fields of a row of bench/results/<device>/<op>.json."""
    measured_ms: float | None = None
    """Forward and backward, all `count` of them."""

    def floor_ms(self, machine: Machine, *, fused: bool = True) -> float:
        """The least time."""
        num_bytes = self.fused_bytes if fused else self.eager_bytes
        return 1e3 * max(self.flops / machine.flops_per_s, num_bytes / machine.bytes_per_s)

    def bound(self, machine: Machine) -> str:
        """What limits it."""
        return "compute" if self.flops / machine.flops_per_s > self.fused_bytes / machine.bytes_per_s else "memory"


# ---------------------------------------------------------------------------- ops at a size


def linear(detail: str, count: int, rows: int, inputs: int, outputs: int) -> Work:
    """Product with weights: forward, gradient of the input, gradient of the weights; each reads two and writes one."""
    tensors = rows * inputs + inputs * outputs + rows * outputs
    num_bytes = 3 * LOW * count * tensors
    flops = 6 * count * rows * inputs * outputs
    return Work(op="linear", detail=detail, count=count, flops=flops, fused_bytes=num_bytes, eager_bytes=num_bytes)


def self_attention(config: TransformerConfig, batch: int, tokens: int) -> Work:
    """q, k, v in, out: 4 tensors; backward reads those and the gradient, writes three."""
    elements = batch * tokens * config.width
    num_bytes = config.depth * LOW * elements * (4 + 8)
    return Work(
        op="attention",
        detail=f"{config.num_heads} heads of {config.width // config.num_heads}, {tokens} tokens",
        count=config.depth,
        flops=config.depth * 12 * batch * config.width * tokens**2,
        fused_bytes=num_bytes,
        eager_bytes=num_bytes,
        fields={"shape": [batch, config.num_heads, tokens, config.width // config.num_heads]} | BF16,
    )


def norms(
    count: int, shape: tuple[int, int, int], *, modulated: bool, residual: bool = False, last: bool = False
) -> Work:
    """Norm and modulation, with the residual before it (`residual`) or without. x, r: float32; branch, y: bf16.

    Fused, forward: reads x, branch; writes r, y. Backward: reads r, dr, dy (and branch, for the gate); writes dx,
    dbranch. Without the residual dr is added by autograd (4+4+4), except behind the last block, where there is none.
    Eager, forward: [gate: 2+2], add: 4+2+4, norm: 4+4, [scale: 4+4, shift: 4+4], cast: 4+2. Backward: cast: 2+4,
    norm: 4+4+4 (and 8 for its weights, or, modulated: sums and products for shift and scale 4, 4+4, 4+4+4, 4), add dr,
    cast to the branch: 4+2, [gate: 2+2, 2+2+2, 2].
    """
    elements, accumulate = shape[0] * shape[1] * shape[2], 0 if last else 12
    forward, backward = (8 + 16 + 6, 6 + 12 + 28) if modulated else (8 + 6, 6 + 20)
    eager = forward + backward + accumulate
    if residual:
        fused = 12 + (18 if modulated else 16)
        eager += (4 + 10 + 6 + 12) if modulated else 10 + 6
    else:
        fused = 6 + 10 + accumulate
    prefix = ("gated residual, " if modulated else "residual, ") if residual else ""
    kind = {(True, True): "middle", (True, False): "first", (False, True): "uvit"}.get((modulated, residual))
    return Work(
        op="modulated_norm",
        detail=prefix + ("modulated norm" if modulated else "norm"),
        count=count,
        fused_bytes=count * fused * elements,
        eager_bytes=count * eager * elements,
        fields=None if kind is None else {"shape": list(shape), "kind": kind} | BF16,
    )


def residuals(count: int, shape: tuple[int, int, int], *, gated: bool) -> Work:
    """The residual that ends a block: reads x and the branch, writes r; backward reads dr, writes dbranch.

    Gated, backward also reads the branch. Eager has kernels of their own for the gate: 2+2; 2+2, 2+2+2, 2.
    """
    elements = count * shape[0] * shape[1] * shape[2]
    fused, eager = (10 + 8, 4 + 10 + 6 + 12) if gated else (10 + 6, 10 + 6)
    return Work(
        op="modulated_norm" if gated else "residual",
        detail="gated residual" if gated else "",
        count=count,
        fused_bytes=fused * elements,
        eager_bytes=eager * elements,
        fields={"shape": list(shape), "kind": "end"} | BF16 if gated else None,
    )


def activation(config: TransformerConfig, rows: int) -> Work:
    """GELU: reads and writes once; backward reads two, writes one. Eager has one kernel for each as well."""
    num_bytes = config.depth * LOW * 5 * rows * config.mlp_width
    approximate = "tanh" if isinstance(config, DiTConfig) else "none"
    return Work(
        op="gelu",
        detail=approximate,
        count=config.depth,
        fused_bytes=num_bytes,
        eager_bytes=num_bytes,
        fields={"shape": [rows, config.mlp_width], "approximate": approximate} | BF16,
    )


def joins(count: int, shape: tuple[int, int, int]) -> Work:
    """What surrounds the products of a skip's Linear, per element of x: casts of x and skip and the sum of gradients.

    Fused: two casts 2*(4+2), backward two casts 2*(2+4), sum of the skip's gradients 4+4+4. Eager also concatenates in
    float32 (8+8; the cast is then 8+4), and backward splits the gradient (4+8, 8+8).
    """
    elements = count * shape[0] * shape[1] * shape[2]
    fused, eager = 12 + 12 + 12, (16 + 12) + (12 + 16 + 12)
    return Work(
        op="skip_linear",
        detail="around its two products",
        count=count,
        fused_bytes=fused * elements,
        eager_bytes=eager * elements,
    )


def noise_and_loss(config: BackboneConfig, batch: int) -> Work:
    """Fused: x0 in, x_t out; pred and x0 in, gradient out. Eager: randn; two products, sum, cast; same for y; error."""
    channels, height, width = config.input_shape
    elements = batch * channels * height * width
    eager = 4 + (8 + 8 + 12 + 6) + (8 + 8 + 12) + (2 + 4 + 4) + (4 + 4 + 4) + (4 + 4 + 4 + 2)
    return Work(
        op="diffusion_loss",
        detail="with add_noise",
        count=1,
        fused_bytes=(4 + 2 + 2 + 4 + 2) * elements,
        eager_bytes=eager * elements,
        fields={"shape": [batch, channels, height, width], "noise": "drawn", "work": "all"} | BF16,
    )


def optimizer(config: BackboneConfig) -> tuple[Work, Work]:
    """AdamW and EMA: 36 bytes a parameter in one pass, 80 + 12 by foreach; casts of weights and gradients."""
    count = parameter_count(config)
    name = next((name for name, preset in presets.MODELS.items() if preset == config), None)
    update = Work(
        op="adamw_ema",
        detail="one average",
        count=1,
        fused_bytes=36 * count,
        eager_bytes=92 * count,
        fields={"model": name, "clip": False},
    )
    casts = Work(
        op="casts", detail="weights to bf16, gradients back", count=1, fused_bytes=12 * count, eager_bytes=12 * count
    )
    return update, casts


# ---------------------------------------------------------------------------- networks


def _block_products(config: TransformerConfig, rows: int) -> Iterator[Work]:
    D, M = config.width, config.mlp_width
    for detail, inputs, outputs in (("qkv", D, 3 * D), ("proj", D, D), ("fc1", D, M), ("fc2", M, D)):
        yield linear(detail, config.depth, rows, inputs, outputs)


def _dit(config: DiTConfig, batch: int) -> Iterator[Work]:
    D, T = config.width, config.num_patches
    rows, shape = batch * T, (batch, T, D)
    patch = config.patch_size**2
    yield from _block_products(config, rows)
    yield linear("adaLN, per image", 1, batch, D, (6 * config.depth + 2) * D)
    yield linear("patches in", 1, rows, config.input_shape[0] * patch, D)
    yield linear("patches out", 1, rows, D, config.out_channels * patch)
    yield linear("time in, per image", 1, batch, TIME_FEATURES, D)
    yield linear("time out, per image", 1, batch, D, D)
    yield self_attention(config, batch, T)
    yield norms(config.depth, shape, modulated=True)
    yield norms(config.depth, shape, modulated=True, residual=True)
    yield norms(1, shape, modulated=True, last=True)
    yield residuals(config.depth, shape, gated=True)
    yield activation(config, rows)


def _uvit(config: UViTConfig, batch: int) -> Iterator[Work]:
    D, T = config.width, config.num_patches + config.extra_tokens
    rows, shape, skips = batch * T, (batch, T, D), config.depth // 2
    channels, height, width = config.input_shape
    patch = channels * config.patch_size**2
    yield from _block_products(config, rows)
    yield linear("skip", skips, rows, 2 * D, D)
    yield linear("patches in", 1, rows, patch, D)
    yield linear("patches out", 1, rows, D, patch)
    if config.conv:
        yield linear("convolution", 1, batch * height * width, 9 * channels, channels)
    if config.mlp_time_embed:
        yield linear("time, per image", 1, batch, D, 8 * D)
    yield self_attention(config, batch, T)
    yield norms(config.depth, shape, modulated=False)
    yield norms(config.depth, shape, modulated=False, residual=True)
    yield norms(1, shape, modulated=False, last=True)
    yield residuals(config.depth, shape, gated=False)
    yield activation(config, rows)
    yield joins(skips, shape)


NETWORKS = {DiTConfig: _dit, UViTConfig: _uvit}


def step_budget(config: BackboneConfig, batch: int) -> list[Work]:
    """Every op of one training step (forward, backward, optimiser, EMA) with its operations and bytes.

    Raises:
        ValueError: this kind of network is not described here.
    """
    if type(config) not in NETWORKS:
        known = ", ".join(kind.backbone for kind in NETWORKS)
        raise ValueError(f"no budget is written for {config.backbone}; there is one for {known}")
    return [*NETWORKS[type(config)](config, batch), noise_and_loss(config, batch), *optimizer(config)]


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
