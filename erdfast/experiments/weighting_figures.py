"""The weighting experiment's figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from erdfast.figure_style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    YELLOW,
    new_figure,
    save_figure,
    tidy,
)

from .weighting_cells import TARGETS
from .weighting_statistics import (
    BASELINE,
    Result,
    common_seeds,
    excess_in,
    final_frechet,
    last,
    of_study,
    ratio,
    relative_excess,
    sample_value,
    select,
    studies,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {
    "constant": (BLACK, "-", "o"),
    "min_snr": (BLUE, "--", "s"),
    "p2": (GREEN, "-.", "^"),
    "debias": (PURPLE, ":", "D"),
    "erd": (ORANGE, "-", "o"),
    "erd_logsnr": (YELLOW, "--", "v"),
    "erd_sampled": (SKY, "-.", "P"),
    "erd_logsnr_sampled": (GREY, ":", "X"),
}
"""Colour, line and marker of each weighting."""
NAMES = {
    "erd": "erd (time)",
    "erd_logsnr": "erd (log-SNR)",
    "erd_sampled": "erd (time, as sampling)",
    "erd_logsnr_sampled": "erd (log-SNR, as sampling)",
}
NETWORK_NAMES = {"dit": "DiT", "uvit": "U-ViT", "dit_s2": "DiT-S/2"}


def draw_excess(cells: Sequence[Result], path: Path) -> None:
    """Of the first study of mixtures: excess over floor by log-SNR, and the same over that without weighting."""
    study = studies(cells)[0]
    own = of_study(cells, study)
    targets = [target for target in TARGETS if select(own, target=target)]
    figure = new_figure(4.9 * len(targets) + 0.6, 8.0)
    counts = [len(select(own, target=target, weighting=w)) for target in targets for w in STYLES]
    seeds = " to ".join(str(n) for n in sorted({min(n for n in counts if n), max(counts)}))
    about = f"{title_of(study)},{_or_line(targets)}geometric mean over seeds ({seeds})"
    figure.suptitle(f"Distance from the best possible prediction,{_or_line(targets)}{about}", fontsize=13)
    grid = figure.subplots(2, len(targets), squeeze=False, sharex=True, sharey="row")
    for (above, below), target in zip(grid.T, targets, strict=True):
        chosen = select(own, target=target)
        _draw_levels(above, chosen)
        _draw_levels(below, chosen, over_constant=True)
        above.set_title(f"{target} prediction", loc="left", fontsize=11)
        below.set_xlabel("log-SNR      noise  ←  →  clean")
    grid[0, 0].set_ylabel("excess / Bayes floor")
    grid[1, 0].set_ylabel("the same / that of constant")
    _legend_below(figure, grid[0, 0])
    save_figure(path, figure)


def _levels(cells: Sequence[Result]) -> np.ndarray:
    """Geometric mean over seeds of the relative excess by level."""
    return np.exp(np.mean([np.log(relative_excess(last(cell))) for cell in cells], axis=0))


def _draw_levels(axes: Axes, cells: Sequence[Result], *, over_constant: bool = False) -> None:
    """Over those of `constant` with the same seeds, if so wished."""
    base = select(cells, weighting=BASELINE)
    for weighting, (color, line, _) in STYLES.items():
        own = select(cells, weighting=weighting)
        if over_constant:
            shared = common_seeds(cells, (weighting, BASELINE))
            own = [cell for cell in own if cell["seed"] in shared]
        if own:
            values = _levels(own)
            if over_constant:
                seeds = {cell["seed"] for cell in own}
                values = values / _levels([cell for cell in base if cell["seed"] in seeds])
            axes.plot(last(own[0])["logsnr"], values, line, color=color, linewidth=1.9, label=name_of(weighting))
    axes.set_yscale("log")
    if over_constant:
        _plain_ratios(axes)
    tidy(axes)


def draw_samples(cells: Sequence[Result], path: Path) -> None:
    """Excess and Frechet distance of each weighting over those without, all studies: a point for each."""
    panels: list[tuple[str, Callable[[Result], float], list[tuple[str, str, float]]]] = []
    mixtures = [study for study in studies(cells) if study[0] != "digits"]
    if mixtures:
        panels.append(("mean excess / that of constant", lambda cell: excess_in(last(cell), "all"), mixtures))
    panels.append(("Frechet distance / that of constant", final_frechet, studies(cells)))
    targets = _trained(cells)
    figure = new_figure(4.9 * len(targets) + 0.8, 3.6 * len(panels) + 0.8)
    figure.suptitle(
        f"Each weighting against none{_or_line(targets)}(bars: one standard deviation over seeds)", fontsize=13
    )
    grid = figure.subplots(len(panels), len(targets), squeeze=False)  # eps alone has weightings that are far off
    for row, (label, measure, shown) in zip(grid, panels, strict=True):
        for axes, target in zip(row, targets, strict=True):
            _draw_ratios(axes, [(s, select(of_study(cells, s), target=target)) for s in shown], measure)
            axes.set_title(f"{target} prediction", loc="left", fontsize=11)
        row[0].set_ylabel(label)
    _legend_below(figure, grid[0, 0])
    save_figure(path, figure)


def _draw_ratios(
    axes: Axes,
    groups: Sequence[tuple[tuple[str, str, float], list[Result]]],
    measure: Callable[[Result], float],
) -> None:
    others = [weighting for weighting in STYLES if weighting != BASELINE]
    for number, weighting in enumerate(others):
        color, _, marker = STYLES[weighting]
        offset = (number - (len(others) - 1) / 2) * 0.13
        found = [(at + offset, ratio(own, weighting, measure)) for at, (_, own) in enumerate(groups)]
        points = [(x, r) for x, r in found if r is not None]
        if points:
            y = [r.value for _, r in points]
            bars = [[r.value - r.low for _, r in points], [r.high - r.value for _, r in points]]
            style = {"color": color, "markersize": 6, "linewidth": 1.3, "label": name_of(weighting)}
            axes.errorbar([x for x, _ in points], y, yerr=bars, fmt=marker, **style)
    axes.axhline(1.0, color=BLACK, linewidth=1.0, label="constant")
    for at in range(1, len(groups)):
        axes.axvline(at - 0.5, color="#DDDDDD", linewidth=0.8, zorder=0.5)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_xticks(range(len(groups)), [_tick_of(s) for s, _ in groups], fontsize=7.5)
    axes.set_yscale("log")
    _plain_ratios(axes)
    tidy(axes)
    axes.grid(False, axis="x")


def draw_training(cells: Sequence[Result], path: Path) -> None:
    """Frechet distance against training steps: a row for each study, a column for each target."""
    shown, targets = studies(cells), _trained(cells)
    figure = new_figure(4.6 * len(targets) + 0.7, 2.9 * len(shown) + 0.9)
    figure.suptitle(
        f"Frechet distance of samples along the training,{_or_line(targets)}geometric mean over seeds", fontsize=13
    )
    grid = figure.subplots(len(shown), len(targets), squeeze=False)
    for row, study in zip(grid, shown, strict=True):
        for axes, target in zip(row, targets, strict=True):
            own = select(of_study(cells, study), target=target)
            if own:
                _draw_curves(axes, own)
            else:
                axes.set_axis_off()
            halves = "; dotted: one half of them for the other" if study[0] == "digits" else ""
            axes.set_title(f"{target}: {title_of(study)}{halves}", loc="left", fontsize=10)
        row[0].set_ylabel("Frechet distance")
    for axes in grid[-1]:
        axes.set_xlabel("training step")
    _legend_below(figure, grid[0, 0])
    save_figure(path, figure)


def _draw_curves(axes: Axes, cells: Sequence[Result]) -> None:
    for weighting, (color, line, marker) in STYLES.items():
        own = select(cells, weighting=weighting)
        if own:
            logs = [[math.log(sample_value(point, "frechet")) for point in cell["curve"]] for cell in own]
            steps = [point["step"] for point in own[0]["curve"]]
            values = np.exp(np.mean(logs, axis=0))
            style = {"linewidth": 1.7, "marker": marker, "markersize": 4.5, "label": name_of(weighting)}
            axes.plot(steps, values, line, color=color, **style)
    best = float(np.mean([last(cell)["samples"]["perfect"]["frechet"] for cell in cells]))
    axes.axhline(best, color=GREY, linewidth=1.2, linestyle=(0, (1, 1)), label="perfect samples")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:
        _plain_ratios(axes)
    tidy(axes)


def _trained(cells: Sequence[Result]) -> list[str]:
    """Targets."""
    return [target for target in TARGETS if select(cells, target=target)]


def _or_line(targets: Sequence[str]) -> str:
    """What parts a title that a single panel is too narrow for."""
    return " " if len(targets) > 1 else "\n"


def name_of(weighting: str) -> str:
    """For people."""
    return NAMES.get(weighting, weighting)


def title_of(study: tuple[str, str, float]) -> str:
    """mixture 4x8x8, spread 0.4, DiT."""
    data, network, std = study
    spread = f", spread {std:g}" if std else ""
    return f"{data.replace('_', ' ')}{spread}, {NETWORK_NAMES[network]}"


def _tick_of(study: tuple[str, str, float]) -> str:
    """4x8x8, spread 0.4, DiT in three lines."""
    return title_of(study).removeprefix("mixture ").replace(", ", "\n")


def _plain_ratios(axes: Axes) -> None:
    """0.5 and 2 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 3.0, 5.0, 7.0) if high < 100.0 * low else (1.0, 3.0)  # as many as find room
    axes.yaxis.set_major_locator(LogLocator(subs=subs) if high > 2.5 * low else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, below them, in as many columns as find room."""
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), max(2, int(figure.get_figwidth() / 1.6)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5)
