"""What the documents claim about weightings, and what the weighting experiment saw, a line each, with its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import mean

from erdfast.diagnostics.toy_findings import rank_correlation

from .weighting_cells import IN_PAPER, TARGETS, USUAL
from .weighting_statistics import (
    BASELINE,
    Result,
    common_seeds,
    excess_in,
    final_excess,
    final_frechet,
    last,
    of_study,
    ranking,
    ratio,
    sample_value,
    select,
    studies,
)

Measure = Callable[[Result], float]


def claims(cells: Sequence[Result]) -> list[list[str]]:
    """Rows of (claim, where it is made, what was seen); a claim on what was not trained says so."""
    mixtures = [cell for cell in cells if cell["data"] != "digits"]
    rows = [
        (
            "ERD has the lowest FID of baseline, Min-SNR, P2 and ERD for eps, x0 and v prediction",
            "ERD, fig. 6",
            _first_places(cells, final_frechet, "Frechet distance"),
        ),
        ("... throughout the training", "ERD, sec. 4.3", _first_places_along(cells)),
        ("ERD improves on no weighting, for DiT and U-ViT alike", "ERD, tables 1, 3", _improves(cells)),
        (
            "Weighting by recoverability brings networks closer to the best prediction",
            "ERD, sec. 3.4",
            _first_places(mixtures, final_excess, "excess"),
        ),
        (
            "Less weight where the target is poorly recoverable helps elsewhere",
            "ERD, prop. 3.7, sec. 3.4",
            _elsewhere(mixtures),
        ),
        (
            "Excess is least where the floor is high and massive where it is low",
            "ERD, sec. F.2",
            _excess_against_floor(mixtures),
        ),
        (
            "What counts is the allocation over log-SNR, not over time",
            "ERD, remark E.2",
            _pairs(cells, ("erd_logsnr", "erd_logsnr_sampled"), "erd"),
        ),
        (
            "Drawing times by the weight trains better than weighing",
            "this project",
            _pairs(cells, ("erd_sampled",), "erd"),
        ),
    ]
    return [list(row) for row in rows]


def _groups(cells: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """(target, its cells) of every study."""
    for study in studies(cells):
        for target in TARGETS:
            if own := select(of_study(cells, study), target=target):
                yield target, own


def _first_places(cells: Sequence[Result], measure: Measure, name: str) -> str:
    """By target, how often ERD is first among the paper's four, and who is among all."""
    parts = []
    for target in TARGETS:
        groups = [own for t, own in _groups(cells) if t == target and common_seeds(own, IN_PAPER)]
        if groups:
            firsts = sum(ranking(own, measure, IN_PAPER)[0] == "erd" for own in groups)
            runs = [select(own, seed=seed) for own in groups for seed in sorted(common_seeds(own, IN_PAPER))]
            alone = sum(ranking(run, measure, IN_PAPER)[0] == "erd" for run in runs)
            winners = [order[0] for own in groups if (order := ranking(own, measure, USUAL))]
            parts.append(
                f"{target}: first in {firsts} of {len(groups)} studies, {alone} of {len(runs)} single seeds"
                + (f" (of all weightings most often first: {_most_frequent(winners)})" if winners else "")
            )
    return f"By {name}, " + "; ".join(parts) if parts else "not trained"


def _first_places_along(cells: Sequence[Result]) -> str:
    counts: dict[int, list[bool]] = {}
    for _, own in _groups(cells):
        if common_seeds(own, IN_PAPER):
            for number in range(len(own[0]["curve"])):
                first = ranking(own, lambda cell, n=number: sample_value(cell["curve"][n], "frechet"), IN_PAPER)[0]
                counts.setdefault(number, []).append(first == "erd")
    if not counts:
        return "not trained"
    named = ("a quarter", "half", "all")[-len(counts) :]
    parts = [f"{sum(hits)} of {len(hits)} after {name}" for name, hits in zip(named, counts.values(), strict=True)]
    return "First in " + ", ".join(parts) + " of the training (studies times targets)"


def _improves(cells: Sequence[Result]) -> str:
    parts = []
    for network, name in (("dit", "DiT"), ("uvit", "U-ViT"), ("dit_s2", "DiT-S/2")):
        of_network = [cell for cell in cells if cell["network"] == network]
        found = [ratio(own, "erd", final_frechet) for _, own in _groups(of_network)]
        ratios = [r for r in found if r is not None]
        if ratios:
            better, count = sum(r.better for r in ratios), sum(r.count for r in ratios)
            parts.append(
                f"{name}: Frechet distance times {_middle([r.value for r in ratios])}, "
                f"lower in {better} of {count} runs ({_targets_of(of_network)})"
            )
    return "; ".join(parts) or "not trained"


def _targets_of(cells: Sequence[Result]) -> str:
    """Where ERD can be compared with no weighting."""
    found = [target for target, own in _groups(cells) if ratio(own, "erd", final_frechet)]
    return ", ".join(f"{target} in {found.count(target)}" for target in TARGETS if target in found) + " studies"


def _elsewhere(cells: Sequence[Result]) -> str:
    """ERD takes weight from low noise for eps, from high noise for x0: what becomes of the other end, and of that."""
    parts = []
    for target, taken, other in (("eps", "low noise", "high noise"), ("x0", "high noise", "low noise")):
        values = []
        for band in (other, taken):
            found = [ratio(own, "erd", _band(band)) for t, own in _groups(cells) if t == target]
            values.append([r.value for r in found if r is not None])
        if values[0]:
            parts.append(
                f"{target}: excess at {other} times {_middle(values[0])}, "
                f"at {taken}, from where weight was taken, times {_middle(values[1])}"
            )
    return "; ".join(parts) or "not trained"


def _excess_against_floor(cells: Sequence[Result]) -> str:
    """Rank correlation over noise levels of excess and floor, both in the network's own target, without weighting."""
    parts = []
    for target in TARGETS:
        found = []
        for cell in select(cells, target=target, weighting=BASELINE):
            point = last(cell)
            factor = [_own_space(target, at) for at in point["logsnr"]]
            excess = [f * x for f, x in zip(factor, point["v_excess"], strict=True)]
            floor = [f * x for f, x in zip(factor, point["v_floor"], strict=True)]
            found.append(rank_correlation(excess, floor))
        if found:
            parts.append(f"{target} {mean(found):+.2f}")
    return (
        f"Rank correlation of excess and floor in the own target (the claim: near -1): {', '.join(parts)}"
        if parts
        else "not trained"
    )


def _own_space(target: str, logsnr: float) -> float:
    """From an error in v to one in the target, squared, on a variance-preserving schedule."""
    if target == "v":
        return 1.0
    return 1.0 / (1.0 + math.exp(logsnr if target == "x0" else -logsnr))


def _pairs(cells: Sequence[Result], first: Sequence[str], second: str) -> str:
    """Each of `first` over `second`, in the runs that have all of them (if there are such)."""
    shared = [
        cell
        for _, own in _groups(cells)
        for cell in own
        if cell["seed"] in common_seeds(own, (*first, second)) and cell["weighting"] in (*first, second)
    ]
    parts = [part for name in first if (part := _pair(shared or cells, name, second))]
    return ". ".join(parts) or "not trained"


def _pair(cells: Sequence[Result], first: str, second: str) -> str:
    """Excess and Frechet distance: geometric means over runs, from the least to the largest, target by target."""
    parts = []
    for name, measure, own_cells in (
        ("excess", final_excess, [cell for cell in cells if cell["data"] != "digits"]),
        ("Frechet distance", final_frechet, list(cells)),
    ):
        by_target: dict[str, list[float]] = {}
        for target, own in _groups(own_cells):
            by_target.setdefault(target, []).extend(_log_ratios(own, first, second, measure))
        each = [f"{target} {_with_range(by_target[target])}" for target in TARGETS if by_target.get(target)]
        if each:
            logs = [x for found in by_target.values() for x in found]
            parts.append(f"{name} times {', '.join(each)}, lower in {sum(x < 0 for x in logs)} of {len(logs)} runs")
    return f"{first} against {second}: " + "; ".join(parts) if parts else ""


def _with_range(logs: Sequence[float]) -> str:
    """1.23 (0.9 to 1.6)"""
    return f"{math.exp(mean(logs)):.2f} ({math.exp(min(logs)):.2g} to {math.exp(max(logs)):.3g})"


def _log_ratios(cells: Sequence[Result], first: str, second: str, measure: Measure) -> list[float]:
    values = [{c["seed"]: measure(c) for c in select(cells, weighting=weighting)} for weighting in (first, second)]
    return [math.log(values[0][seed] / values[1][seed]) for seed in values[0] if seed in values[1]]


def _most_frequent(names: Sequence[str]) -> str:
    """All that are equally often there."""
    most = max(map(names.count, names))
    return " and ".join(name for name in dict.fromkeys(names) if names.count(name) == most)


def _band(band: str) -> Measure:
    return lambda cell: excess_in(last(cell), band)


def _middle(values: Sequence[float]) -> str:
    return f"{math.exp(mean(map(math.log, values))):.2f}"
