"""The figures of `diagnose run`: one curve per run in each, over the log-SNR."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from erdfast.data import GaussianMixture
from erdfast.figure_style import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, YELLOW, new_figure, tidy

from .allocation import Allocation
from .gradients import LevelGradients, cosines
from .noise_level_losses import LevelMeasures
from .subject import Levels, Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW)
MARKERS = ("o", "s", "^", "D", "v")
LINES = ("-", "--", "-.", ":")
"""Of different lengths, so that no two of many runs look alike."""
LOGSNR = "log-SNR, ln(α²/σ²)      noisy  ←  →  clean"
_SHOWN = 12.0
"""Of the log-SNR in the figure of weights, which knows more than what is measured."""


class Measured(NamedTuple):
    """A run and all that was found."""

    subject: Subject
    levels: Levels
    allocation: Allocation
    losses: LevelMeasures
    gradients: LevelGradients

    @property
    def has_floor(self) -> bool:
        """Whether the best possible prediction is known."""
        return isinstance(self.subject.dataset, GaussianMixture)

    @property
    def weight(self) -> Tensor:
        """(L,) w at the levels."""
        return self.levels.coef.w


def differ(runs: Sequence[Measured]) -> bool:
    """Whether the errors of these runs are of different things: another target, schedule or noise scale."""
    first = runs[0].losses.to_v
    return any(run.losses.to_v.shape != first.shape or not torch.allclose(run.losses.to_v, first) for run in runs[1:])


def draw_losses(runs: Sequence[Measured]) -> Figure:
    """Error by noise level; as errors of v too where the runs' own cannot be compared; excess where it is known."""
    compared, known = differ(runs), [run for run in runs if run.has_floor]
    figure, axes = _panels(1 + compared + bool(known))
    _draw_loss(axes[0], runs, lambda run: torch.ones_like(run.losses.to_v))
    targets = {run.subject.process.target_name for run in runs}
    axes[0].set_title(
        f"Error of {targets.pop()}" if len(targets) == 1 else "Error of each run's own target", loc="left"
    )
    if compared:
        _draw_loss(axes[1], runs, lambda run: run.losses.to_v)
        axes[1].set_title("The same as errors of v", loc="left")
    if known:
        for number, run in enumerate(runs):
            if run.has_floor:
                factor = run.losses.to_v if compared else torch.ones_like(run.losses.to_v)
                _curve(axes[-1], number, run, factor * run.losses.excess, factor * run.losses.excess_error)
        axes[-1].set_title(f"Excess above the Bayes floor{' (v)' if compared else ''}", loc="left")
    for each in axes:
        each.set_ylabel("mean squared error per element")
        _logarithmic(each)
    return _finished(figure, runs, axes)


def _draw_loss(axes: Axes, runs: Sequence[Measured], factor: Callable[[Measured], Tensor]) -> None:
    for number, run in enumerate(runs):
        by = factor(run)
        _curve(axes, number, run, by * run.losses.loss, by * run.losses.loss_error)
    floors = [(run.levels.logsnr, factor(run) * run.losses.floor) if run.has_floor else None for run in runs]
    _dotted(axes, floors, "Bayes floor")


def draw_allocation(runs: Sequence[Measured]) -> Figure:
    """w, p and M = w p over the log-SNR, with ERD's omega."""
    figure, (weight, density, share) = _panels(3)
    omegas: list[tuple[Tensor, Tensor] | None] = []
    for number, run in enumerate(runs):
        a = run.allocation
        inside = a.logsnr.abs() <= _SHOWN
        for axes, values in ((weight, a.weight), (density, a.density), (share, a.share)):
            _curve(axes, number, run, values[inside], at=a.logsnr[inside])
        omegas.append((a.logsnr[inside], a.omega[inside]))
    _dotted(share, omegas, "ERD's ω, with M's integral over ±10")
    weight.set_title("Weight w of an error", loc="left")
    weight.set_ylabel("w")
    _logarithmic(weight)
    density.set_title("Density of the drawn levels", loc="left")
    density.set_ylabel("p(t)|dt/dλ|, per unit of log-SNR")
    share.set_title("Allocation M(λ) ∝ w(t) p(t)|dt/dλ|", loc="left")
    share.set_ylabel("M, per unit of log-SNR")
    for axes in (density, share):
        _from_zero(axes)
    return _finished(figure, runs, (weight, density, share))


def draw_gradients(runs: Sequence[Measured]) -> Figure:
    """Norm of the mean gradient, without and with the weight, and the SNR of one sample's gradient."""
    figure, (plain, weighted, snr) = _panels(3)
    for number, run in enumerate(runs):
        g = run.gradients
        norm = g.squared_norm.clamp(min=0.0).sqrt().where(g.squared_norm > 0, torch.nan)
        error = g.squared_norm_error / (2.0 * norm)
        _curve(plain, number, run, norm, error)
        _curve(weighted, number, run, run.weight * norm, run.weight * error)
        _curve(snr, number, run, g.snr.where(g.snr > 0, torch.nan), g.snr_error)
    plain.set_title("Mean gradient, not weighed", loc="left")
    plain.set_ylabel("|E g|")
    weighted.set_title("Mean gradient times w(t)", loc="left")
    weighted.set_ylabel("w |E g|")
    snr.set_title("Signal to noise of one sample's gradient", loc="left")
    snr.set_ylabel("|E g|² / tr Cov(g)")
    for axes in (plain, weighted, snr):
        _logarithmic(axes)
    return _finished(figure, runs, (plain, weighted, snr))


def draw_cosines(runs: Sequence[Measured]) -> Figure:
    """How far the mean gradients of two levels agree: a map per run."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    columns = min(len(runs), 3)
    rows = math.ceil(len(runs) / columns)
    figure = new_figure(5.2 * columns + 0.8, 4.6 * rows)
    grid = np.ravel(figure.subplots(rows, columns, squeeze=False))
    colors, norm = colormaps["RdBu_r"].with_extremes(bad="#BBBBBB"), Normalize(-1.0, 1.0)
    for axes, run in zip(grid, runs, strict=False):
        edges = _edges(run.levels.logsnr)
        values = np.ma.masked_invalid(cosines(run.gradients).numpy())
        axes.pcolormesh(edges, edges, values, cmap=colors, norm=norm)
        axes.set_title(_legible(run.subject.name), loc="left", fontsize=11)
        axes.set_aspect("equal")
        axes.set_xlabel(LOGSNR)
        axes.set_ylabel("log-SNR")
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=list(grid), shrink=0.85)
    bar.set_label("cosine of mean gradients (grey: lost in noise)")
    return figure


def draw_ranks(runs: Sequence[Measured]) -> Figure:
    """Effective ranks of features and predictions."""
    figure, (pooled, tokens, outputs) = _panels(3)
    for number, run in enumerate(runs):
        _curve(pooled, number, run, run.losses.rank_pooled)
        _curve(tokens, number, run, run.losses.rank_tokens)
        _curve(outputs, number, run, run.losses.rank_outputs)
    best = [(run.levels.logsnr, run.losses.rank_best) if run.has_floor else None for run in runs]
    _dotted(outputs, best, "best possible predictions")
    pooled.set_title("Features, mean of an image's tokens", loc="left")
    tokens.set_title("Features of single tokens", loc="left")
    outputs.set_title("Predictions", loc="left")
    for axes in (pooled, tokens, outputs):
        axes.set_ylabel("effective rank")
        _from_zero(axes)
    return _finished(figure, runs, (pooled, tokens, outputs))


# ---------------------------------------------------------------------- what all share


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = new_figure(5.2 * count + 0.6 * (count == 1), 4.6)
    return figure, list(np.ravel(figure.subplots(1, count, squeeze=False)))


def _curve(
    axes: Axes, number: int, run: Measured, values: Tensor, errors: Tensor | None = None, at: Tensor | None = None
) -> None:
    """A run's line, with markers and standard errors where it was measured."""
    style = {"color": COLORS[number % len(COLORS)], "linestyle": LINES[number % len(LINES)], "linewidth": 1.7}
    style["label"] = _legible(run.subject.name)
    if at is not None:
        every = max(len(at) // 12, 1)
        marks = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "markevery": (number * every // 4, every)}
        axes.plot(at.numpy(), values.numpy(), **style, **marks)
        return
    marks = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4.5, "capsize": 2.5, "elinewidth": 1.0}
    axes.errorbar(
        run.levels.logsnr.numpy(), values.numpy(), None if errors is None else errors.numpy(), **style, **marks
    )


def _legible(name: str) -> str:
    """As matplotlib shows it: it takes dollars for formulas, and leaves what begins with "_" out of legends."""
    return re.sub(r"^_", " _", name.replace("$", r"\$"))


def _dotted(axes: Axes, curves: Sequence[tuple[Tensor, Tensor] | None], label: str) -> None:
    """What runs are compared with: one black curve where it is the same for all, else each in its run's colour."""
    known = [(number, *curve) for number, curve in enumerate(curves) if curve is not None]
    if not known:
        return
    style: dict[str, Any] = {"linewidth": 1.4, "linestyle": (0, (1, 1)), "zorder": 3}
    alike = all(_same(known[0][2], values) for _, _, values in known)
    for number, at, values in known[:1] if alike else known:
        axes.plot(at.numpy(), values.numpy(), color=BLACK if alike else COLORS[number % len(COLORS)], **style)
    axes.plot([], [], color=BLACK, label=label, **style)


def _from_zero(axes: Axes) -> None:
    """With room above the highest curve."""
    highest = float(axes.dataLim.y1)
    axes.set_ylim(0.0, 1.08 * highest if highest > 0 else 1.0)


def _logarithmic(axes: Axes) -> None:
    """With plain numbers, and enough of them where there is less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low > 1e4:
        return
    if high / low < 5:
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finished(figure: Figure, runs: Sequence[Measured], axes: Sequence[Axes]) -> Figure:
    """Axes alike, and one legend below them all."""
    found: dict[str, Any] = {}
    for each in axes:
        each.set_xlabel(LOGSNR)
        tidy(each)
        found |= dict(zip(*reversed(each.get_legend_handles_labels()), strict=True))
    columns = min(len(found), 4 if len(axes) > 1 else 2)
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _same(one: Tensor, other: Tensor) -> bool:
    """Within a line's width: the levels of a discrete schedule are not quite those of others."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0.05, equal_nan=True)


def _edges(points: Tensor) -> np.ndarray:
    """Of cells around points: half-way between them, and as far beyond the ends."""
    middle = 0.5 * (points[1:] + points[:-1])
    return torch.cat([2 * points[:1] - middle[:1], middle, 2 * points[-1:] - middle[-1:]]).numpy()
