"""`python -m erdfast.diagnose mixture`: the toy of the ERD paper (sec. 3, appendix F) and what it bears out.

Four targets on three processes, each as one network for all times and as five networks of time bins, against the Bayes
floor, which is known. Every training is a file of its own in DIR/cells, so that a run that is stopped goes on where it
was; the figures are drawn from those files alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from erdfast.cells import read_cell, run_missing

from . import toy_figures
from .report import Report, write_json
from .toy_cells import ToyCell, check_result, run_cell
from .toy_data import PROCESSES, TARGETS
from .toy_findings import Trained, claims_table, gather, judge, rank_correlation, short, summary_table
from .toy_measures import BINS, GRAM_TIMES, LEVELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL = {"iterations": 2000, "per_mode": 1024, "kernel_per_mode": 64, "gram_per_mode": 24}
QUICK = {"iterations": 100, "per_mode": 256, "kernel_per_mode": 24, "gram_per_mode": 12}


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The ERD paper's toy, whole: four targets, three processes, against closed forms."""

    out: Path
    """Folder of figures, numbers and index.html; trainings that are in it already are kept."""
    quick: bool = False
    """A twentieth of the iterations and fewer points: shows that it works, in two minutes; its numbers mean little."""
    workers: int = 2
    """Processes, of one thread each."""
    seed: int = 0
    """Of data, noise, times and weights."""
    time_scale: float = 1.0
    """Factor of the time in [0, 1] before its sines and cosines, the fastest of which has frequency 1. The paper names
    none; with 1000, as in diffusion transformers, some of its claims come out otherwise."""

    def validate(self) -> None:
        """Raise ValueError for a number out of range."""
        if not 1 <= self.workers <= 64:
            raise ValueError(f"workers is {self.workers}; it must be at least 1 and at most 64")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and below 2^32")
        if not 0.0 < self.time_scale <= 1e4:
            raise ValueError(f"time_scale is {self.time_scale}; it must be above 0 and at most 10000")


def diagnose_mixture(options: Mixture, about: Mapping[str, Any]) -> None:
    """Train what is missing, measure, draw; prints where the page is.

    Args:
        about: what was started and where, for the page.

    Raises:
        ImportError: matplotlib is missing.
        OSError: a file cannot be written.
    """
    cells = planned_cells(options)
    folder = options.out / "cells"
    run_missing(run_cell, cells, folder, options.workers, check_result)
    found = [read_cell(folder, cell, check_result) for cell in cells]
    page = write_page([cell for cell in found if cell is not None], options.out, about)
    print(f"written: {page}")


def planned_cells(options: Mixture) -> list[ToyCell]:
    """Each once, those of all times first: they are the longest."""
    sizes = QUICK if options.quick else FULL
    return [
        ToyCell(process=process, target=target, part=part, seed=options.seed, time_scale=options.time_scale, **sizes)
        for part in (None, *range(BINS))
        for process in PROCESSES
        for target in TARGETS
    ]


@dataclass(frozen=True)
class Section:
    """A kind of figure: one for each process."""

    name: str
    title: str
    says: str
    """What is shown, and what the paper says of it."""
    draw: Callable[[Mapping[str, Trained]], Figure]
    found: Callable[[Mapping[str, Trained]], str]
    """A sentence of what was computed."""
    keys: Sequence[str]
    """Of the numbers behind the figure, in the cell of all times."""


def write_page(cells: Sequence[Mapping[str, Any]], out: Path, about: Mapping[str, Any]) -> Path:
    """Figures, their numbers, claims.json and index.html, from the cells' numbers; returns the page's path."""
    trained = gather([dict(cell) for cell in cells])
    judged = judge(trained)
    write_json(out / "claims.json", {"about": about, "claims": judged})
    report = Report(out, "Four modes in the plane: what noise levels do to training", about)
    first = cells[0]
    few = "" if first["iterations"] >= FULL["iterations"] else " So few iterations show that it works; they say little."
    report.heading(
        "What was found",
        f"Four targets on three processes, {first['iterations']:,} iterations of {first['batch']} samples each: one "
        f"network for all times, and {BINS} networks for one bin of them each. u is eps - x0 on every process. The "
        "excess is the mean squared distance per element from E[y | x_t], which is known: what the error exceeds the "
        "Bayes floor by. Untrained: the same network before its first step, on the same points: what is there already "
        f"is not made by training.{few}",
    )
    report.table(claims_table(judged), "What the paper says (appendix F), and where it came out so")
    report.table(summary_table(trained), "Numbers by process and target")
    for section in SECTIONS:
        report.heading(section.title, section.says)
        for process, by_target in trained.items():
            numbers = {target: _numbers(it, section.keys) for target, it in by_target.items()}
            caption = f"{process}. {section.found(by_target)}"
            report.figure(f"{section.name}_{process}", section.draw(by_target), numbers, caption)
    return report.close()


def _numbers(it: Trained, keys: Sequence[str]) -> dict[str, Any]:
    """What a figure shows of one target."""
    curves = ("floor", "loss", "excess", "bins_loss", "bins_excess", "early_excess")
    if not keys:
        return {"time": list(LEVELS), **{name: it.curve(name) for name in curves}}
    return {key: it.whole["kernels"][key] if key in it.whole["kernels"] else it.whole[key] for key in keys}


def _each(by_target: Mapping[str, Trained], text: Callable[[Trained], str]) -> str:
    return ", ".join(f"{target} {text(it)}" for target, it in by_target.items())


def _losses(by_target: Mapping[str, Trained]) -> str:
    def worst(it: Trained) -> str:
        excess, floor = it.curve("excess"), it.curve("floor")
        at = excess.index(max(excess))
        return f"t = {LEVELS[at]:.2f} ({short(excess[at])}, floor {short(floor[at])})"

    def better(it: Trained) -> str:
        whole, bins, early = (mean(it.curve(name)) for name in ("excess", "bins_excess", "early_excess"))
        return f"{short(whole / bins)} ({short(whole / early)} from as many samples in all)"

    def lowest(it: Trained) -> str:
        excess, floor = it.curve("excess"), it.curve("floor")
        at = floor.index(min(floor))
        return f"{short(excess[at] / floor[at])} (t = {LEVELS[at]:.2f})"

    correlation = _each(by_target, lambda it: f"{rank_correlation(it.curve('floor'), it.curve('excess')):.2f}")
    return (
        f"Rank correlation of floor and excess: {correlation}. Largest excess: {_each(by_target, worst)}. Excess over "
        f"floor where the floor is least: {_each(by_target, lowest)}. Mean excess of one network over that of bins: "
        f"{_each(by_target, better)}."
    )


def _phases(by_target: Mapping[str, Trained]) -> str:
    def ends(it: Trained) -> str:
        first, last = it.whole["phases"][0], it.whole["phases"][-1]
        return f"{first['contaminated']:.0%} at t = {first['time']} and {last['contaminated']:.0%} at {last['time']}"

    return f"Samples above the diagonal: {_each(by_target, ends)}."


def _features(by_target: Mapping[str, Trained]) -> str:
    def end(it: Trained) -> str:
        last = it.whole["features"][-1]
        return (
            f"{last['spread']:.2f}, between modes {last['between']:.0%}, probe {last['probe']:.0%} where "
            f"{last['best']:.0%} is possible, rank {short(it.whole['features'][0]['rank'])} to {short(last['rank'])}"
        )

    return f"At t = {by_target[TARGETS[0]].whole['features'][-1]['time']}: {_each(by_target, end)}."


def _predictions(by_target: Mapping[str, Trained]) -> str:
    def ends(it: Trained) -> str:
        return " ".join(short(found["distance"]) for found in it.whole["predictions"])

    return f"Root mean square distance between the two clouds, from low noise to high: {_each(by_target, ends)}."


def _spectra(by_target: Mapping[str, Trained]) -> str:
    low, high = GRAM_TIMES

    def top(it: Trained, network: str) -> str:
        return short(it.at(high, network)[0][0] / it.at(low, network)[0][0])

    def course(it: Trained, network: str) -> str:
        ranks = it.whole["kernels"][network]["rank"]
        return f"{it.at(low, network)[1]:.1f} to {it.at(high, network)[1]:.1f}, at most {max(ranks):.1f}"

    def rank(it: Trained) -> str:
        return f"{course(it, 'trained')} (untrained {course(it, 'start')})"

    fall = _each(by_target, lambda it: f"{top(it, 'trained')} (untrained {top(it, 'start')})")
    return f"Largest eigenvalue at t = {high} over that at {low}: {fall}. Effective rank: {_each(by_target, rank)}."


def _grams(by_target: Mapping[str, Trained]) -> str:
    def both(it: Trained) -> str:
        parts = (f"{g['within']:.2f} and {g['between']:.2f}" for g in it.whole["kernels"]["grams"])
        return " to ".join(parts)

    low, high = GRAM_TIMES
    return f"Mean cosine within and between modes, from t = {low} to {high}: {_each(by_target, both)}."


def _couplings(by_target: Mapping[str, Trained]) -> str:
    def far(it: Trained) -> str:
        cosine = it.whole["kernels"]["coupling"]["cosine"]
        return f"{cosine[0][-1]:.2f} (least {min(map(min, cosine)):.2f})"

    return f"Between the first and the last time: {_each(by_target, far)}."


SECTIONS = (
    Section(
        "loss",
        "Error and Bayes floor",
        "Held-out error by time against the least possible one, and the excess. The paper (figs. 2 and 7): the excess "
        "is least where the floor is high and massive where it is low, and networks of time bins come close to the "
        "floor. A network of a bin has five times as many samples for each time; crosses show bins at a fifth of their "
        "iterations, when all together had seen as many as the one network.",
        toy_figures.draw_losses,
        _losses,
        (),
    ),
    Section(
        "phase",
        "What can be predicted and what cannot",
        "Norms of E[y | x_t] and of y - E[y | x_t], sample by sample, in closed form: no network is involved. The "
        "paper (figs. 3 and 8): eps crosses into the half of noise at low noise levels alone, x0 at high ones alone, "
        "v and u are more balanced and avoid a single such end.",
        toy_figures.draw_phases,
        _phases,
        ("phases",),
    ),
    Section(
        "features",
        "Hidden features",
        "The 256 features before the readout in the plane of their first two principal components at t = 0.1. The "
        "paper (fig. 9): clear clusters at low noise shrink to an entangled mass at high noise. Spread: the distance "
        "from the mean in all 256 dimensions, as a share of that at t = 0.1. Probe: how often a linear probe finds the "
        "mode, of how often anything could from x_t: what noise has hidden no features can show.",
        toy_figures.draw_features,
        _features,
        ("features",),
    ),
    Section(
        "ntk",
        "Spectrum of the tangent kernel",
        "Largest eigenvalues and effective rank of the kernel by time. The paper (figs. 10 and 11): eigenvalues of x0 "
        "and u fall by orders of magnitude, those of eps have the shape of a U, and the rank plummets at the extremes, "
        "above all towards t = 1. "
        "Grey: the untrained network, which has this from the inputs alone.",
        toy_figures.draw_spectra,
        _spectra,
        ("time", "trained", "start"),
    ),
    Section(
        "gram",
        "Gram matrices of the tangent kernel",
        "Cosines between the Jacobians of points, ordered by mode. The paper (fig. 12): blocks of aligned points at "
        "low noise, near orthogonal to each other; one uniform block at high noise. Where x_t does not tell the mode "
        "there can be no blocks of modes; uniform means that cosines between them are near 1.",
        toy_figures.draw_grams,
        _grams,
        ("grams",),
    ),
    Section(
        "coupling",
        "Coupling of noise levels",
        "How much two times share the directions in which a step moves the parameters: the cosine of their J'J, from "
        "the joint kernel over all times (the paper's fig. 4a). 1: one to the optimiser; 0: apart.",
        toy_figures.draw_couplings,
        _couplings,
        ("coupling",),
    ),
    Section(
        "predictions",
        "Predictions at rising noise",
        "What the network of all times predicts (coloured by the mode of the sample) and the best prediction (grey "
        "rings); a toy version of the paper's fig. 1.",
        toy_figures.draw_predictions,
        _predictions,
        ("predictions",),
    ),
)
