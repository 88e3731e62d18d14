"""From the cells of the weighting experiment to the numbers that are compared.

The excess of a network at a noise level is divided by the Bayes floor there. Errors in x0, eps, v and any other target
differ by a factor that the floor has too, so the quotient does not depend on the space; 0.1 means a loss 10% above the
least possible one. Over noise levels its geometric mean is taken, which no level can dominate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any, NamedTuple

from erdfast.cells import mean_and_spread, select

Result = dict[str, Any]
BANDS: dict[str, Callable[[float], bool]] = {
    "all": lambda _: True,
    "low noise": lambda logsnr: logsnr > 2.5,
    "middle": lambda logsnr: abs(logsnr) < 2.5,
    "high noise": lambda logsnr: logsnr < -2.5,
}
"""Of log-SNR: 17 levels from 8 to -8, of which 6, 5 and 6."""
BASELINE = "constant"


class Ratio(NamedTuple):
    """What a weighting makes of a number, over `constant` with the same seed."""

    value: float
    """Geometric mean over seeds; below 1 is better than `constant`."""
    low: float
    """That mean over, and times, one geometric standard deviation of the seeds."""
    high: float
    better: int
    """Seeds in which it was below 1."""
    count: int
    """Seeds."""


def check_result(cell: Result) -> None:
    """Raise LookupError, TypeError, ValueError or ArithmeticError where a number that is compared is missing or odd."""
    for point in cell["curve"]:
        values = [point["step"], sample_value(point, "frechet")]
        if cell["data"] != "digits":
            values += relative_excess(point)
            math.fsum(point["logsnr"])
        if not all(0 < value < math.inf for value in values):
            raise ValueError("distances, excesses and steps must be positive and finite")
    if cell["curve"]:
        math.fsum(number for measures in last(cell)["samples"].values() for number in measures.values())
        math.log(last(cell)["samples"]["perfect"]["frechet"])


def studies(cells: Iterable[Result]) -> list[tuple[str, str, float]]:
    """(data, network, std) in the order in which they come."""
    return list(dict.fromkeys((cell["data"], cell["network"], cell["std"]) for cell in cells))


def of_study(cells: Iterable[Result], study: tuple[str, str, float]) -> list[Result]:
    """Its cells."""
    return select(cells, data=study[0], network=study[1], std=study[2])


def relative_excess(point: Result) -> list[float]:
    """Excess over floor at each level of a point of the curve."""
    return [excess / floor for excess, floor in zip(point["v_excess"], point["v_floor"], strict=True)]


def excess_in(point: Result, band: str) -> float:
    """Geometric mean of the relative excess over the levels of a band."""
    values = [x for x, at in zip(relative_excess(point), point["logsnr"], strict=True) if BANDS[band](at)]
    return math.exp(mean(math.log(x) for x in values))


def sample_value(point: Result, name: str, sampler_steps: str | None = None) -> float:
    """A measure of the samples; by default with as many sampler steps as along the training."""
    by_steps = point["samples"]
    if sampler_steps is None:
        known = [steps for steps in by_steps if steps != "perfect"]
        sampler_steps = known[0] if len(known) == 1 else "9"
    return by_steps[sampler_steps][name]


def last(cell: Result) -> Result:
    """The end of its training."""
    return cell["curve"][-1]


def ratio(cells: Sequence[Result], weighting: str, measure: Callable[[Result], float]) -> Ratio | None:
    """A weighting against `constant` among the cells of one study and target, seed by seed; None if none has both."""
    base = {cell["seed"]: measure(cell) for cell in select(cells, weighting=BASELINE)}
    own = {cell["seed"]: measure(cell) for cell in select(cells, weighting=weighting)}
    logs = [math.log(own[seed] / base[seed]) for seed in own if seed in base]
    if not logs:
        return None
    middle, spread = mean_and_spread(logs)
    ends = (math.exp(middle - spread), math.exp(middle + spread))
    return Ratio(math.exp(middle), *ends, sum(x < 0 for x in logs), len(logs))


def common_seeds(cells: Sequence[Result], weightings: Iterable[str]) -> set[int]:
    """Seeds that all of these have in one study and target: an unfinished experiment has more of some."""
    return set.intersection(*({cell["seed"] for cell in select(cells, weighting=w)} for w in weightings))


def ranking(
    cells: Sequence[Result], measure: Callable[[Result], float], among: Iterable[str] | None = None
) -> list[str]:
    """Weightings of one study and target, the least geometric mean over the seeds that all have first; empty if none.

    Args:
        cells: of the study and target.
        measure: what is compared.
        among: these alone; by default all that are there.
    """
    weightings = list(dict.fromkeys(cell["weighting"] for cell in cells) if among is None else among)
    seeds = common_seeds(cells, weightings)
    if not seeds:
        return []
    cells = [cell for cell in cells if cell["seed"] in seeds]
    logs = {w: mean(math.log(measure(cell)) for cell in select(cells, weighting=w)) for w in weightings}
    return sorted(logs, key=lambda w: logs[w])


def final_excess(cell: Result) -> float:
    """`excess_in` all bands at the end."""
    return excess_in(last(cell), "all")


def final_frechet(cell: Result) -> float:
    """Frechet distance at the end."""
    return sample_value(last(cell), "frechet")
