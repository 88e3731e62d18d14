"""Drawing images by EDM's Heun sampler: ours, with and without torch.compile, beside a plain loop and the ERD authors'.

    python -m bench.bench_sampler --erd ~/ERD

All sides draw as many images from one network with random weights, in turn: without guidance, and with guidance 2.1 in
the interval [0, 0.8]. bench/sampler_sides.py says what each side does. Prints a table, images per second, whether ours
is as much faster than theirs as GOALS say, and what memory grows with the number of images; writes
bench/results/<device>/sampler.json.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bench.device import default_device
from bench.harness import Case, run_cases
from bench.sampler_sides import Run, sides
from erdfast import presets
from erdfast.models import Backbone
from erdfast.models.flops import forward_flops, parameter_count
from erdfast.process import Process
from erdfast.sampling import make_levels, sample_batches

OP = "sampler"
SIZES = {
    "cuda": (("uvit_h2", 64), ("dit_xl2", 64), ("dit_b2", 256)),
    "cpu": (("uvit_digits", 16),),
}
"""Networks, and images at a time."""
STEPS = {"cuda": 10, "cpu": 6}
GUIDANCE: dict[str, tuple[float, tuple[float, float]]] = {"plain": (1.0, (0.0, 1.0)), "interval": (2.1, (0.0, 0.8))}
GOALS = {"plain": 1.3, "interval": 1.5}
"""Least speed of ours over that of the ERD authors' sampler, same network."""
OURS, THEIRS = ("fused", "ours_compile"), ("erd", "erd_whole")


@functools.lru_cache(maxsize=1)
def network(model: str, device: str) -> tuple[Backbone, Process]:
    """With random numbers in place of the zeros that training starts from: products of zeros are faster."""
    built = presets.build_model(model).to(device).requires_grad_(False).eval()
    for parameter in built.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return built, Process(schedule="cosine", target="eps", weighting="erd").to(device)


def cases(device: str, dtypes: Sequence[torch.dtype], erd: str | None = None) -> Iterator[Case]:
    """Networks, dtypes, with and without guidance."""
    for dtype in dtypes:
        for model, num in SIZES[device]:
            for kind in GUIDANCE:
                yield make_case(model, num, STEPS[device], dtype, device, kind, erd)


def make_case(
    model: str, num: int, steps: int, dtype: torch.dtype, device: str, kind: str, erd: str | None = None
) -> Case:
    """Every call of the network reads all weights at least once."""
    config = presets.model_config(model)
    built, process = network(model, device)
    cfg_scale, interval = GUIDANCE[kind]
    run = Run(model=built, process=process, num=num, steps=steps, dtype=dtype, cfg_scale=cfg_scale, interval=interval)
    calls, halves = 2 * steps - 1, images_seen(process, steps, kind)
    return Case(
        name=f"{model} {num} images {kind} {str(dtype).removeprefix('torch.')}",
        fields={"model": model, "images": num, "steps": steps, "guidance": kind, "dtype": dtype},
        make_inputs=lambda i: (i,),
        sides=sides(run, erd),
        passes=("forward",),
        bytes={"forward": calls * dtype.itemsize * parameter_count(config)},
        flops={"forward": halves * num * forward_flops(config)},
        backend="reference" if device == "cpu" else None,  # what a network calls is compiled for GPUs alone
        compile=False,
    )


def images_seen(process: Process, steps: int, kind: str) -> int:
    """Images that the network sees for each one drawn."""
    cfg_scale, (low, high) = GUIDANCE[kind]
    times = make_levels(process, steps).times
    seen = [1 + (cfg_scale != 1.0 and low <= time / 999.0 <= high) for time in times]
    return seen[0] + 2 * sum(seen[1:])


def verdicts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Images per second of every side, and ours over theirs where theirs was measured."""
    for row in rows:
        timings: dict[str, dict[str, float]] = row["timings"][0]
        num, kind = row["fields"]["images"], row["fields"]["guidance"]
        speeds = "  ".join(f"{side} {1e3 * num / timing['p50_ms']:,.1f}" for side, timing in timings.items())
        yield f"{row['case']}: images/s: {speeds}"
        for other, side in itertools.product(THEIRS, OURS):
            if other in timings:
                theirs, own = timings[other], timings[side]
                median = theirs["p50_ms"] / own["p50_ms"]
                low, high = theirs["p20_ms"] / own["p80_ms"], theirs["p80_ms"] / own["p20_ms"]
                answer = "yes" if median >= GOALS[kind] else "no"
                yield f"    {side} over {other} {median:.2f}x ({low:.2f}-{high:.2f}); at least {GOALS[kind]}x: {answer}"


def memory_growth(model: str, num: int, device: str) -> str:
    """What the most memory in use grows by from the 2nd batch to the 10th."""
    built, process = network(model, device)
    peaks: list[float] = []
    for _ in sample_batches(built, process, num=10 * num, batch_size=num, steps=2):
        peaks.append(peak_bytes(device))
    grown = peaks[-1] - peaks[1]
    images = 8 * num * 4 * math.prod(built.input_shape)
    return (
        f"{model}: eight more batches of {num} raise the peak by {grown / 1e6:.2f} MB; images alone {images / 1e6:.2f}"
    )


def peak_bytes(device: str) -> float:
    """Of the GPU's memory, or of the process's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--erd", metavar="PATH", help="a checkout of the ERD authors' repository, measured as well")
    options, rest = parser.parse_known_args(argv)
    rows = run_cases(OP, partial(cases, erd=options.erd), __doc__, rest)
    print(*verdicts(rows), sep="\n")
    device = default_device()
    model, num = SIZES[device][-1]
    print(memory_growth(model, num, device))


if __name__ == "__main__":
    main()
