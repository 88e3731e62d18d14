"""Weak scaling from 8 to 512 GPUs: what is sent, how much of it computing hides, what remains of the speed. A model.

    python -m bench.scaling --model uvit_h2 --device h200 --batch 128
    python -m bench.scaling --model uvit_h2 --device h200 --batch 128 --step-ms 250

Bytes, links, latency and what is hidden: erdfast.training.traffic, for machines of 8. The time that a GPU computes is
the same for any number of GPUs: as measured on one (--step-ms), or else the floor of bench.roofline over an assumed
share of it. A third of it is forward, two thirds are backward; the optimiser is counted as if it belonged to them.
Nothing here was measured between GPUs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from bench.options import above, at_least
from bench.roofline import MACHINES, step_budget, totals
from erdfast import presets
from erdfast.models import BackboneConfig
from erdfast.models.flops import parameter_count
from erdfast.training.gpus import GPUS, GPUS_PER_MACHINE, Gpu
from erdfast.training.traffic import LINK_SHARE, Pass, Sent, exposed_s, modes_for, step_traffic

SIZES = (8, 16, 32, 64, 128, 256, 512)
"""GPUs; whole machines."""
FLOOR_SHARE = 0.6
"""Of the roofline's speed. An assumption, above what was published (20.5% of the peak on Hopper): the faster GPUs
compute, the less of the communication hides behind it."""


class Row(NamedTuple):
    """One way to share the work among so many GPUs."""

    mode: str
    gpus: int
    sent: Sent
    """By each GPU in a step."""
    communication_s: float
    """Of a step, hidden or not."""
    exposed_s: float
    """Of it, what is not hidden."""
    step_s: float
    images_per_s: float
    """Of all GPUs."""

    @property
    def hidden(self) -> float:
        """Share of the communication behind which GPUs compute; 1 where there is none."""
        return 1 - self.exposed_s / self.communication_s if self.communication_s else 1.0

    def efficiency(self, base: Row) -> float:
        """Images per second and GPU, over those of `base`."""
        return self.images_per_s / self.gpus / (base.images_per_s / base.gpus)


def scaling_row(
    config: BackboneConfig, batch: int, gpu: Gpu, mode: str, gpus: int, compute_s: float, *, gradient_bytes: int = 4
) -> Row:
    """What is sent and how long a step takes.

    Args:
        config: the network.
        batch: images per GPU and step, whatever the number of GPUs.
        gpu: of which kind they are.
        mode: "none" for one GPU, else "ddp", "fsdp" or, on several machines, "hsdp".
        gpus: how many.
        compute_s: seconds that one GPU computes in a step.
        gradient_bytes: of a gradient under ddp.

    Raises:
        ValueError: a mode that this number of GPUs does not have, or an impossible number.
    """
    traffic = step_traffic(
        mode, parameter_count(config), config.accounting().blocks, gpus, gradient_bytes=gradient_bytes
    )
    communication_s = 2 * traffic.gather.seconds(gpu) + traffic.reduce.seconds(gpu)
    one = Pass(forward_s=compute_s / 3, backward_s=2 * compute_s / 3)
    waiting_s = exposed_s(traffic, gpu, one, blocks=config.accounting().blocks)
    step_s = compute_s + waiting_s
    return Row(mode, gpus, traffic.total(), communication_s, waiting_s, step_s, gpus * batch / step_s)


def floor_s(config: BackboneConfig, batch: int, device: str) -> float:
    """Least seconds of a step on one GPU, with this package's fusions: `bench.roofline`."""
    _, fused_ms, _ = totals(step_budget(config, batch), MACHINES[device])
    return 1e-3 * fused_ms


def table(rows: Sequence[Row]) -> list[str]:
    """Aligned lines, each mode from 8 GPUs on; hsdp, which begins with 16, is compared with fsdp on 8."""
    lines = [
        f"{'mode':5} {'GPUs':>5} {'GB NVLink':>10} {'GB network':>11} {'comm. ms':>9} {'hidden':>7} {'step ms':>9} "
        f"{'images/s':>10} {'efficiency':>11}"
    ]
    bases = {row.mode: row for row in rows if row.gpus == GPUS_PER_MACHINE}
    bases["hsdp"] = bases["fsdp"]  # on one machine they are the same
    for row in rows:
        lines.append(
            f"{row.mode:5} {row.gpus:5} {row.sent.nvlink / 1e9:10.3f} {row.sent.network / 1e9:11.3f} "
            f"{1e3 * row.communication_s:9.2f} {row.hidden:7.1%} {1e3 * row.step_s:9.2f} {row.images_per_s:10,.0f} "
            f"{row.efficiency(bases[row.mode]):11.1%}"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="uvit_h2", choices=list(presets.MODELS), metavar="PRESET")
    parser.add_argument("--device", default="h200", choices=list(GPUS))
    parser.add_argument("--batch", type=at_least(1), default=128, help="images per GPU and step")
    parser.add_argument("--step-ms", type=above(0.0), help="a step on one GPU, as measured (bench.bench_train_step)")
    parser.add_argument("--ddp-bf16", action="store_true", help="ddp: send gradients as bf16")
    options = parser.parse_args(argv)
    config, gpu = presets.model_config(options.model), GPUS[options.device]
    if options.step_ms is None:
        compute_s = floor_s(config, options.batch, options.device) / FLOOR_SHARE
        source = f"assumed: the floor of bench.roofline at {FLOOR_SHARE:.0%}"
    else:
        compute_s, source = 1e-3 * options.step_ms, "given"
    rows = [
        scaling_row(config, options.batch, gpu, mode, gpus, compute_s, gradient_bytes=2 if options.ddp_bf16 else 4)
        for mode in modes_for(max(SIZES))
        for gpus in SIZES
        if mode in modes_for(gpus)
    ]
    heading = [
        f"{options.model} on {options.device}: {options.batch} images and {1e3 * compute_s:.1f} ms a step on each GPU "
        f"({source})",
        f"model, not measured: {LINK_SHARE:.0%} of NVLink's {gpu.nvlink_bytes_per_s / 1e9:.0f} and the network's "
        f"{gpu.network_bytes_per_s / 1e9:.0f} GB/s per GPU, hidden block by block, NCCL's latencies; no jitter",
        "",
    ]
    print("\n".join(heading + table(rows)))


if __name__ == "__main__":
    main()
