"""What the toy's numbers say: the excess of networks by time, and which of the paper's claims they bear out.

A claim of ERD's appendix F is a number of one (process, target) and what it must be for the claim to hold; where the
paper says nothing of a target, there is no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch

from .toy_data import PROCESSES, TARGETS
from .toy_measures import FEATURE_TIMES, GRAM_TIMES, KERNEL_TIMES

Result = dict[str, Any]
TENFOLD, U_SHAPE, HALVED, BLOCK, UNIFORM = 0.1, 1.5, 0.5, 0.5, 0.75
"""What the paper's words are taken to mean; see CLAIMS."""


@dataclass(frozen=True)
class Trained:
    """All that was measured on one process and target."""

    process: str
    target: str
    whole: Result
    """The cell of all times."""
    bins: Sequence[Result]
    """The cells of the time bins, in their order."""

    def curve(self, which: str) -> list[float]:
        """At LEVELS: `floor`; `loss` and `excess` of the network of all times; `bins_loss` and `bins_excess` of those
        of bins; `early_excess` of the latter when they had seen as many samples as the former."""
        return list(_CURVES[which](self))

    def at(self, time: float, network: str = "trained") -> tuple[list[float], float]:
        """Top eigenvalues and effective rank of the kernel at one of KERNEL_TIMES; of the network as `trained` or as it
        was at the `start`."""
        index, kernels = KERNEL_TIMES.index(time), self.whole["kernels"][network]
        return kernels["top"][index], kernels["rank"][index]


def _joined(cells: Sequence[Result], errors: str, which: str) -> Iterable[float]:
    return (value for cell in cells for value in cell[errors][which])


_CURVES: dict[str, Callable[[Trained], Iterable[float]]] = {
    "floor": lambda it: it.whole["floors"],
    "loss": lambda it: it.whole["errors"]["loss"],
    "excess": lambda it: it.whole["errors"]["excess"],
    "bins_loss": lambda it: _joined(it.bins, "errors", "loss"),
    "bins_excess": lambda it: _joined(it.bins, "errors", "excess"),
    "early_excess": lambda it: _joined(it.bins, "early_errors", "excess"),
}


def gather(cells: Sequence[Result]) -> dict[str, dict[str, Trained]]:
    """Cells by process and by target."""
    found: dict[str, dict[str, Trained]] = {}
    for process in PROCESSES:
        for target in TARGETS:
            own = [cell for cell in cells if (cell["process"], cell["target"]) == (process, target)]
            (whole,) = (cell for cell in own if cell["part"] is None)
            bins = sorted((cell for cell in own if cell["part"] is not None), key=lambda cell: cell["part"])
            found.setdefault(process, {})[target] = Trained(process, target, whole, bins)
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, without ties."""
    ranks = torch.stack([torch.tensor(values, dtype=torch.float64).argsort().argsort() for values in (a, b)])
    return float(torch.corrcoef(ranks.double())[0, 1])


@dataclass(frozen=True)
class Claim:
    """One statement of the paper as a number."""

    key: str
    says: str
    number: str
    """What the number is, and what it must be."""
    measure: Callable[[Trained], float | None]
    holds: Callable[[float], bool]


def _share_of_noise(it: Trained) -> float:
    """How far the ends are from what the paper says of the target; below 0.5 if it is so.

    eps: dominated by noise at the clean end alone; x0: at the noisy end alone; v and u at neither or at both, which is
    taken to be its "avoiding single-pole degradation".
    """
    first, last = (it.whole["phases"][end]["contaminated"] for end in (0, -1))
    if it.target in ("v", "u"):
        return abs(first - last)
    return max(1.0 - first, last) if it.target == "eps" else max(first, 1.0 - last)


def _eigenvalue_drop(it: Trained) -> float | None:
    if it.target not in ("x0", "u"):
        return None
    return it.at(GRAM_TIMES[1])[0][0] / it.at(GRAM_TIMES[0])[0][0]


def _u_shape(it: Trained) -> float | None:
    """The smaller end over the least value."""
    if it.target != "eps":
        return None
    top = [values[0] for values in it.whole["kernels"]["trained"]["top"]]
    return min(top[0], top[-1]) / min(top)


def _blocks(it: Trained) -> float:
    clean = it.whole["kernels"]["grams"][0]
    return clean["within"] - clean["between"]


CLAIMS = (
    Claim(
        "excess",
        "The excess over the Bayes floor is least where the floor is high and large where it is low",
        "rank correlation of floor and excess over times, below 0",
        lambda it: rank_correlation(it.curve("floor"), it.curve("excess")),
        lambda value: value < 0,
    ),
    Claim(
        "bins",
        "Networks of time bins come closer to the floor",
        "mean excess of bins over that of the network of all times, each trained for as many iterations, below 1",
        lambda it: mean(it.curve("bins_excess")) / mean(it.curve("excess")),
        lambda value: value < 1,
    ),
    Claim(
        "bins_early",
        "... and so they do from as many samples in all",
        "the same after a fifth of the iterations of each bin, below 1",
        lambda it: mean(it.curve("early_excess")) / mean(it.curve("excess")),
        lambda value: value < 1,
    ),
    Claim(
        "contamination",
        "The unpredictable part dominates eps at low noise alone, x0 at high noise alone; v and u have no one such end",
        "of eps and x0 the larger share of samples of which this is not so, of those at t = 0.02 and at 0.98; of v and "
        "u the difference between the shares that it dominates at these; below 0.5",
        _share_of_noise,
        lambda value: value < 0.5,
    ),
    Claim(
        "features",
        "Features shrink to an entangled mass towards high noise",
        f"their spread at t = {FEATURE_TIMES[-1]} over that at t = {FEATURE_TIMES[0]}, at most a half",
        lambda it: it.whole["features"][-1]["spread"],
        lambda value: value <= HALVED,
    ),
    Claim(
        "eigenvalues",
        "The eigenvalues of the tangent kernel of x0 and u fall by orders of magnitude",
        f"the largest at t = {GRAM_TIMES[1]} over that at t = {GRAM_TIMES[0]}, at most a tenth",
        _eigenvalue_drop,
        lambda value: value <= TENFOLD,
    ),
    Claim(
        "u_shape",
        "Those of eps have the shape of a U",
        f"the smaller of the two ends of the largest over its least value in between, at least {U_SHAPE}",
        _u_shape,
        lambda value: value >= U_SHAPE,
    ),
    Claim(
        "rank",
        "The effective rank of the kernel plummets at the extremes of time, above all towards t = 1",
        f"that at t = {KERNEL_TIMES[-1]} over the largest of all times, at most a half",
        lambda it: it.whole["kernels"]["trained"]["rank"][-1] / max(it.whole["kernels"]["trained"]["rank"]),
        lambda value: value <= HALVED,
    ),
    Claim(
        "blocks",
        "Gram matrices are block-diagonal at low noise",
        f"mean cosine within modes less that between modes at t = {GRAM_TIMES[0]}, at least {BLOCK}",
        _blocks,
        lambda value: value >= BLOCK,
    ),
    Claim(
        "uniform",
        "... and homogeneous at high noise",
        f"mean cosine between modes at t = {GRAM_TIMES[1]}, at least {UNIFORM}",
        lambda it: it.whole["kernels"]["grams"][1]["between"],
        lambda value: value >= UNIFORM,
    ),
)


def judge(trained: Mapping[str, Mapping[str, Trained]]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """By claim, process and target: the number and whether the claim holds; targets that the paper does not speak of
    are left out."""
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for claim in CLAIMS:
        for process, by_target in trained.items():
            values = {target: claim.measure(it) for target, it in by_target.items()}
            own = {target: {"value": v, "holds": claim.holds(v)} for target, v in values.items() if v is not None}
            found.setdefault(claim.key, {})[process] = own
    return found


def claims_table(judged: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> list[list[str]]:
    """A row for each claim: for which targets it holds, and the numbers."""
    rows = [["what the paper says: what is measured, and what it must be", *PROCESSES]]
    for claim in CLAIMS:
        cells = []
        for process in PROCESSES:
            own = judged[claim.key][process]
            parts = [f"{target} {'yes' if it['holds'] else 'no'} ({short(it['value'])})" for target, it in own.items()]
            cells.append(", ".join(parts))
        rows.append([f"{claim.says}: {claim.number}", *cells])
    return rows


def summary_table(trained: Mapping[str, Mapping[str, Trained]]) -> list[list[str]]:
    """A row for each process and target."""
    low, high = GRAM_TIMES
    head = ["process, target", "mean floor", "excess, all times", "excess, bins", "the same, as many samples"]
    head += [f"rank at t = {low}", f"at {high}", f"untrained at {low}", f"at {high}"]
    rows = [[*head, f"largest eigenvalue, {high} over {low}", "untrained"]]
    for process, by_target in trained.items():
        for target, it in by_target.items():
            numbers = [mean(it.curve(name)) for name in ("floor", "excess", "bins_excess", "early_excess")]
            ranks, tops = [], []
            for network in ("trained", "start"):
                (top_low, rank_low), (top_high, rank_high) = it.at(low, network), it.at(high, network)
                ranks += [rank_low, rank_high]
                tops.append(top_high[0] / top_low[0])
            rows.append([f"{process}, {target}", *(short(value) for value in (*numbers, *ranks, *tops))])
    return rows


def short(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"
