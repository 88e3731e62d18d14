"""Figures of the dimension page, from its numbers and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from erdfast.figure_style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, YELLOW, new_figure, tidy

from .dimension import MEASURES, Measured
from .intrinsic_dimension import ESTIMATORS, participation_ratio
from .linear_theory import k_star

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES_CAPTION = """\
The least loss of a linear layer over k, by d/D; circles mark the least point of each curve. Left, the error is
measured in the target, as in theorem 3.2; right, in the velocity with the floor that k-Diff has in pixel space, but
uniform times. There the least loss is at x0 prediction, and where data fill the space, d = D, v prediction (k = 0.5)
has the largest: both ends are equally good. With k-Diff's own times it is elsewhere: see the next figure."""
OPTIMA_CAPTION = """\
Where the least loss is, over d/D. With the error in the target k* is D/(D+d) to all digits; with the error in the
velocity it is not. At d = D, k and 1-k are equally good where times treat t and 1-t alike; the larger is shown. Black:
D/(D+d) by the estimates from the data, if any."""
CALIBRATION_CAPTION = """\
Estimates of the dimension over the true one, 2,000 points in 64 dimensions, with standard errors. On the line an
estimate is right; the participation ratio counts the span, which for the torus is four times the dimension."""
SIZE_CAPTION = """\
Left: estimates over the number of points; the mean over disjoint parts of the data, with standard errors. A curve
that still rises at its right end says that more points would give more. Right: Levina-Bickel over the number of
neighbours, and the range that is averaged."""
SPECTRUM_CAPTION = """\
Left: share of each principal component in the variance. Right: share of the first components together, with the
participation ratio and the two-NN estimate."""

_DIMS_STYLE = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"), (BLACK, "-"), (YELLOW, "--"))
_MEASURE_STYLE = ((BLUE, "o-"), (ORANGE, "s--"), (GREEN, "^-."), (PURPLE, "D:"))
_ESTIMATOR_STYLE = {
    "two-NN fit": (BLUE, "o-"),
    "two-NN MLE": (ORANGE, "s--"),
    "Levina-Bickel": (GREEN, "^-."),
    "participation ratio": (GREY, "D:"),
}
_K_AXIS = "k (0 is eps, 0.5 v, 1 x0)"


def draw_losses(numbers: Mapping[str, Any]) -> Figure:
    """Delta*/D over k: a panel per measure, a curve per d."""
    figure = new_figure(12.0, 5.2)
    ambient, ks, curves = numbers["ambient"], numbers["k"], numbers["curves"]
    for axes, (measure, by_dim) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for (dim, curve), (color, style) in zip(by_dim.items(), _DIMS_STYLE, strict=True):
            label = f"d/D = {Fraction(int(dim), ambient)}"
            axes.plot(ks, curve["loss"], style, color=color, linewidth=1.8, label=label)
            k = curve["k_star"]
            axes.plot(k, np.interp(k, ks, curve["loss"]), "o", color=color, markersize=9, clip_on=False, zorder=5)
        axes.set_title(MEASURES[measure][0], loc="left", fontsize=11)
        axes.set_xlabel(_K_AXIS)
        axes.set_ylabel(r"least loss $\Delta^*/D$")
        axes.set_yscale("log")
        axes.set_xlim(0.0, 1.0)
        tidy(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def draw_optima(numbers: Mapping[str, Any], data: Measured | None) -> Figure:
    """k* over d/D by measure; the data's estimates on D/(D+d)."""
    figure = new_figure(9.5, 5.2)
    axes = figure.subplots()
    ratios = np.array(numbers["intrinsic"]) / numbers["ambient"]
    fine = np.geomspace(min(1e-3, ratios[0]), 1.0, 200)
    axes.plot(fine, [k_star(1.0, r) for r in fine], color=GREY, linewidth=5, alpha=0.5, label="D/(D + d)")
    for (measure, ks), (color, style) in zip(numbers["k_star"].items(), _MEASURE_STYLE, strict=True):
        axes.plot(ratios, ks, style, color=color, linewidth=1.6, markersize=5, label=MEASURES[measure][0])
    if data is not None:
        found = {name: value.value for name, value in data.estimates.items()}
        found["participation ratio"] = participation_ratio(data.variances)
        for marker, (name, dim) in zip("*XPv", found.items(), strict=True):
            ratio = dim / data.ambient
            label = f"the data, {name}: {k_star(1.0, ratio):.3f}"
            axes.plot(ratio, k_star(1.0, ratio), marker, color=BLACK, markersize=11, label=label, zorder=6)
    axes.set_xscale("log")
    axes.set_xlabel("d/D, intrinsic by ambient dimension")
    axes.set_ylabel(f"k*: {_K_AXIS}")
    axes.set_ylim(-0.03, 1.03)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    tidy(axes)
    return figure


def draw_calibration(numbers: Mapping[str, Any]) -> Figure:
    """Estimates over true dimensions, a panel per kind of manifold."""
    figure = new_figure(12.0, 5.4)
    kinds = list(dict.fromkeys(row["manifold"] for row in numbers["rows"]))
    for axes, kind in zip(figure.subplots(1, len(kinds)), kinds, strict=True):
        rows = [row for row in numbers["rows"] if row["manifold"] == kind]
        dims = [row["d"] for row in rows]
        axes.plot(dims, dims, color=BLACK, linewidth=1.2, label="the truth")
        for name in ESTIMATORS:
            color, style = _ESTIMATOR_STYLE[name]
            values, errors = zip(*(row[name] for row in rows), strict=True)
            axes.errorbar(dims, values, errors, fmt=style, color=color, capsize=3, linewidth=1.5, label=name)
        color, style = _ESTIMATOR_STYLE["participation ratio"]
        ratios = [row["participation ratio"] for row in rows]
        axes.plot(dims, ratios, style, color=color, linewidth=1.5, label="participation ratio")
        _powers_of_two(axes, dims)
        axes.set_title(f"{kind}, rank {rows[0]['rank']}d" if rows[0]["rank"] > 1 else kind, loc="left", fontsize=11)
        axes.set_ylabel("estimate")
        tidy(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def _powers_of_two(axes: Axes, dims: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(dims, [str(d) for d in dims])
    heights = [1, 2, 4, 8, 16, 32, 64]
    axes.set_yticks(heights, [str(d) for d in heights])
    axes.set_xlabel("true dimension d")


def draw_estimators(data: Measured, neighbours: tuple[int, int]) -> Figure:
    """Over the number of points, and over the number of neighbours."""
    figure = new_figure(12.0, 4.8)
    left, right = figure.subplots(1, 2)
    sizes = sorted(data.by_size)
    for number, name in enumerate(ESTIMATORS):
        color, style = _ESTIMATOR_STYLE[name]
        values, errors = zip(*(data.by_size[size][name] for size in sizes), strict=True)
        beside = [size * (1.0 + 0.02 * (number - 1)) for size in sizes]
        left.errorbar(beside, values, errors, fmt=style, color=color, capsize=3, linewidth=1.5, label=name)
    left.set_xscale("log")
    left.set_xticks(sizes, [f"{size:,}" for size in sizes])
    left.minorticks_off()
    left.set_xlabel("number of points")
    left.set_ylabel("estimate of d")
    left.legend(frameon=False, fontsize=9)
    color, style = _ESTIMATOR_STYLE["Levina-Bickel"]
    counts = range(2, 2 + len(data.by_neighbours))
    right.plot(counts, data.by_neighbours, style[1:], color=color, linewidth=1.8, label="Levina-Bickel")
    right.axvspan(*neighbours, color=SKY, alpha=0.25, linewidth=0, label="averaged")
    mle = data.estimates["two-NN MLE"].value
    right.axhline(mle, color=ORANGE, linestyle="--", linewidth=1.4, label="two-NN MLE")
    right.set_xlim(left=0)
    right.set_xlabel("number of neighbours")
    right.set_ylabel("estimate of d")
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        tidy(axes)
    return figure


def draw_spectrum(data: Measured) -> Figure:
    """Shares of the principal components, single and together."""
    figure = new_figure(12.0, 4.6)
    left, right = figure.subplots(1, 2)
    shares = (data.variances / data.variances.sum()).numpy()
    shown = int((shares > 1e-9).sum())
    # A single component has no line: markers show it.
    left.loglog(np.arange(1, shown + 1), shares[:shown], "o-", color=BLUE, linewidth=1.8, markersize=3.5)
    left.set_xlim(0.9, 1.1 * max(shown, 10))
    left.set_xlabel("principal component")
    left.set_ylabel("share of the variance")
    together = shares.cumsum()
    right.semilogx(np.arange(1, len(shares) + 1), together, "o-", color=BLUE, linewidth=1.8, markersize=3.5)
    marks = (
        ("participation ratio", participation_ratio(data.variances), GREY, ":"),
        ("two-NN MLE", data.estimates["two-NN MLE"].value, ORANGE, "--"),
    )
    for name, value, color, style in marks:
        right.axvline(value, color=color, linestyle=style, linewidth=1.6, label=f"{name}: {value:.3g}")
    right.set_xlabel("number of principal components")
    right.set_ylabel("share of the variance, together")
    right.set_ylim(0.0, 1.02)
    right.legend(frameon=False, fontsize=9, loc="lower right")
    for axes in (left, right):
        tidy(axes)
    return figure
