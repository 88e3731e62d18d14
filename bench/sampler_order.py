"""How fast each sampler's error falls with its steps, on a Gaussian mixture whose best network is known in closed form.

    python -m bench.sampler_order

writes bench/results/sampler_order.json and .png; float64 on one core, half a minute, the same numbers every time.

What is measured:

    flow      largest distance of 32 points from the exact probability flow's, which Runge-Kutta's rule gives in
              the angle atan2(sigma, alpha), where every process has the same bounded velocity
    strong    root mean square distance of a stochastic sampler's end points from those that it reaches along the same
              Brownian path in FINE steps
    spread    error of the standard deviation of all that a stochastic sampler can draw, for one Gaussian: end points
              are then linear in the noise, and one run on unit impulses of it gives the law exactly, without chance

Levels are exact: of a continuous process, or of a discrete one at whose labels the steps end. The slope of a row is
that of log(error) over log(steps), by least squares over its last three numbers of steps.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.device import ROOT
from erdfast.atomic import atomic_write, write_text
from erdfast.data.mixture import GaussianMixture
from erdfast.philox import normal
from erdfast.process import Process
from erdfast.sampling.levels import Levels, make_levels
from erdfast.sampling.samplers import ASKS, SAMPLERS

RESULT = ROOT / "bench" / "results" / "sampler_order.json"
MIXTURE = GaussianMixture((1, 2, 2), num_classes=2, modes_per_class=2, std=0.4)
POINTS = 32
STEPS = (8, 16, 32, 64, 128, 256, 512)
FINE = 2048
"""Steps of the reference along a Brownian path; a multiple of all STEPS of a strong order."""
REFERENCE_STEPS = 500
"""Of Runge-Kutta's rule over a quarter turn: its error is below 1e-9."""
FITTED = 3
DEVIATION = 0.4
"""Of the one Gaussian of `spread`."""


class Row(NamedTuple):
    """What is run, and the order that theory says."""

    sampler: str
    measure: str
    schedule: str
    level_set: str
    order: float


ROWS = (
    Row("edm_heun", "flow", "flow", "edm", 2.0),
    Row("edm_euler", "flow", "flow", "edm", 1.0),
    Row("heun", "flow", "flow", "uniform", 2.0),
    Row("euler", "flow", "flow", "uniform", 1.0),
    Row("heun", "flow", "cosine", "uniform", 2.0),
    Row("ddim", "flow", "flow", "uniform", 1.0),
    Row("ddim", "flow", "cosine", "uniform", 1.0),
    Row("dpmpp_2m", "flow", "flow", "uniform", 2.0),
    Row("dpmpp_2m", "flow", "logsnr_uniform", "uniform", 2.0),
    Row("dpmpp_2m", "flow", "vp", "logsnr", 2.0),
    Row("sde_euler", "strong", "flow", "uniform", 1.0),
    Row("sde_heun", "strong", "flow", "uniform", 1.0),
    Row("sde_euler", "spread", "flow", "uniform", 1.0),
    Row("sde_heun", "spread", "flow", "uniform", 2.0),
    Row("sde_heun", "spread", "gvp", "uniform", 2.0),
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row's errors."""

    sampler: str
    measure: str
    schedule: str
    level_set: str
    order: float
    slope: float
    steps: tuple[int, ...]
    errors: tuple[float, ...]


# ---------------------------------------------------------------------------- the best network


def best_network(process: Process, asks: str, clean: Callable[[Tensor, float, float], Tensor]):
    """`Guided`'s method of this name for a known E[x0 | x_t], in float64 throughout; clean: (x_t, alpha, sigma)."""
    discrete = process.schedule.discrete

    def network(x: Tensor, time: float) -> Tensor:
        t = torch.tensor([time], dtype=torch.int64 if discrete else torch.float64)
        alpha, sigma = (float(value) for value in process.schedule.alpha_sigma(t))
        if asks == "denoise":
            return clean(alpha * x, alpha, sigma)
        x0 = clean(x, alpha, sigma)
        if asks == "clean":
            return x0
        noise = (x - alpha * x0) / sigma
        slopes = (-sigma, alpha) if discrete else (float(value) for value in process.schedule.d_alpha_sigma(t))
        d_alpha, d_sigma = slopes
        return d_alpha * x0 + d_sigma * noise

    return network


def make_process(schedule: str) -> Process:
    """1025 labels: equal steps of the label are exact for 2^n + 1 levels."""
    discrete = schedule == "cosine"
    return Process(schedule=schedule, target="x0", weighting="constant", num_timesteps=1025 if discrete else 1000)


def run_levels(row: Row, process: Process, steps: int) -> Levels:
    """Of so many steps, one more for a discrete process, whose last one leads from label 0 to clean data."""
    count = steps + 1 if process.schedule.discrete else steps
    return make_levels(process, count, row.level_set, "ratio" if ASKS[row.sampler] == "denoise" else "time")


# ---------------------------------------------------------------------------- errors


def exact_flow(x: Tensor, start: float, end: float) -> Tensor:
    """Where the mixture's probability flow takes x = x_t/sqrt(alpha^2 + sigma^2) from angle to angle."""

    def velocity(x: Tensor, angle: float) -> Tensor:
        best = MIXTURE.posterior(x, math.cos(angle), math.sin(angle))
        return math.cos(angle) * best.eps - math.sin(angle) * best.x0

    h = (end - start) / REFERENCE_STEPS
    for i in range(REFERENCE_STEPS):
        angle = start + i * h
        k1 = velocity(x, angle)
        k2 = velocity(x + 0.5 * h * k1, angle + 0.5 * h)
        k3 = velocity(x + 0.5 * h * k2, angle + 0.5 * h)
        k4 = velocity(x + h * k3, angle + h)
        x = x + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    return x


@functools.lru_cache
def exact_state(scale: float, start: float, end: float) -> Tensor:
    """Where the flow takes `scale` times the latents."""
    return exact_flow(standard_normal(0) * scale, start, end)


def flow_errors(row: Row, steps: Sequence[int]) -> list[float]:
    """At clean data on `flow` in equal steps, whose last one refines with the others; else at the last level."""
    process = make_process(row.schedule)
    asks = ASKS[row.sampler]
    network = best_network(process, asks, MIXTURE.posterior_mean)
    place = -1 if (row.schedule, row.level_set) == ("flow", "uniform") else -2
    errors = []
    for count in steps:
        levels = run_levels(row, process, count)
        states: list[Tensor] = []
        SAMPLERS[row.sampler](
            network,
            standard_normal(0),
            levels,
            state_dtype=torch.float64,
            callback=lambda i, x, states=states: states.append(x),
        )
        (alpha, sigma), (last_alpha, last_sigma) = levels.amplitudes[0], levels.amplitudes[place]
        exact = exact_state(
            sigma / math.hypot(alpha, sigma), math.atan2(sigma, alpha), math.atan2(last_sigma, last_alpha)
        )
        to_x_t = last_alpha if asks == "denoise" else 1.0
        ours = states[place] * to_x_t / math.hypot(last_alpha, last_sigma)
        errors.append(float((ours - exact).abs().max()))
    return errors


def strong_errors(row: Row, steps: Sequence[int]) -> list[float]:
    """Along one Brownian path for all step counts: noise of a coarse step is the fine steps' sum."""
    process = make_process(row.schedule)
    network = best_network(process, ASKS[row.sampler], MIXTURE.posterior_mean)
    latents, sampler = standard_normal(0), SAMPLERS[row.sampler]
    fine = run_levels(row, process, FINE)
    lost = [before[1] ** 2 - after[1] ** 2 for before, after in pairwise(fine.amplitudes)]
    increments = [math.sqrt(variance) * standard_normal(i + 1) for i, variance in enumerate(lost)]

    def path(count: int) -> Callable[[int], Tensor]:
        ratio = FINE // count

        def noise(i: int) -> Tensor:
            part = slice(i * ratio, (i + 1) * ratio)
            return torch.stack(increments[part]).sum(0) / math.sqrt(sum(lost[part]))

        return noise

    def end(count: int) -> Tensor:
        levels = run_levels(row, process, count)
        return sampler(network, latents, levels, noise=path(count), state_dtype=torch.float64)

    exact = end(FINE)
    return [float((end(count) - exact).square().mean().sqrt()) for count in steps]


def spread_errors(row: Row, steps: Sequence[int]) -> list[float]:
    """Of the standard deviation for x0 ~ N(0, DEVIATION^2): the root of the sum of squared responses to impulses."""
    process = make_process(row.schedule)

    def clean(x: Tensor, alpha: float, sigma: float) -> Tensor:
        return alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * x

    errors = []
    for count in steps:
        impulses = torch.eye(count + 1, dtype=torch.float64)[:, :, None, None, None]
        responses = SAMPLERS[row.sampler](
            best_network(process, ASKS[row.sampler], clean),
            impulses[0],
            run_levels(row, process, count),
            noise=lambda i, impulses=impulses: impulses[i + 1],
            state_dtype=torch.float64,
        )
        errors.append(abs(float(responses.square().sum().sqrt()) - DEVIATION))
    return errors


def standard_normal(stream: int) -> Tensor:
    """(POINTS, 1, 2, 2) float64."""
    return normal(0, stream, torch.arange(POINTS), math.prod(MIXTURE.shape), domain="latent").view(-1, *MIXTURE.shape)


MEASURES: dict[str, Callable[[Row, Sequence[int]], list[float]]] = {
    "flow": flow_errors,
    "strong": strong_errors,
    "spread": spread_errors,
}


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Order of convergence: minus the slope of log(error) over log(steps), by least squares."""
    x, y = (torch.tensor(values, dtype=torch.float64).log()[-FITTED:] for values in (steps, errors))
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / x.square().sum())


def measure(row: Row, steps: Sequence[int] = STEPS) -> Result:
    """Errors and slope of one row."""
    errors = MEASURES[row.measure](row, steps)
    return Result(**row._asdict(), slope=slope(steps, errors), steps=tuple(steps), errors=tuple(errors))


# ---------------------------------------------------------------------------- files


def draw(results: Sequence[Result], path: Path) -> None:
    """Error over steps, one panel for each measure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = {
        "flow": "end points, probability flow",
        "strong": "end points along one Brownian path",
        "spread": "standard deviation of the samples",
    }
    figure = Figure(figsize=(15, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for result in results:
            if result.measure == name:
                label = f"{result.sampler}, {result.schedule} {result.level_set}: {result.slope:.2f}"
                axes.loglog(result.steps, result.errors, marker="o", markersize=3, label=label)
        axes.set(title=title, xlabel="steps", ylabel="error")
        axes.set_xticks(STEPS, [str(count) for count in STEPS], minor=False)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=axes.get_ylim()[0] / 30.0)  # room for the legend
        axes.legend(title="sampler, levels: slope", fontsize=7, loc="lower left")
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png", dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file; the picture lies beside it")
    out: Path = parser.parse_args(argv).out
    torch.set_num_threads(1)  # sums in one order on every machine
    results = []
    for row in ROWS:
        result = measure(row)
        results.append(result)
        name = f"{result.sampler:10} {result.measure:7} {result.schedule:15} {result.level_set:8}"
        errors = " ".join(f"{error:.1e}" for error in result.errors)
        print(f"{name} slope {result.slope:5.2f} of {result.order:g}   errors {errors}")
    rows = [
        asdict(result) | {"slope": round(result.slope, 4), "errors": [float(f"{error:.6g}") for error in result.errors]}
        for result in results
    ]
    write_text(out, json.dumps({"points": POINTS, "fine_steps": FINE, "rows": rows}, indent=2) + "\n")
    draw(results, out.with_suffix(".png"))
    print(f"written: {out}, {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
