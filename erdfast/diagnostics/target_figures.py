"""Figures of the targets page, from its numbers and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from erdfast.figure_style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, YELLOW, new_figure, tidy

from .target_estimates import DataEstimates, Estimate, estimate, root
from .target_statistics import QUANTITIES, TARGETS, build_schedule, preserves_variance
from .targets import LOGSNR, Curves, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOGSNR_CAPTION = """\
The three numbers over the log-SNR, by target: lines are closed forms, markers estimates, if there are data, with twice
their standard errors. Schedules that preserve the variance share their curves but for u, the
velocity of the schedule, whose size is that of its slope; of u, markers are of the first such schedule and of others
that do not preserve the variance. Conditional means above 1 are on a logarithmic scale if there are data. Conditional
variances below 1e-4, among them lower bounds of 0, lie below the picture: a filled marker alone is no certainty."""
TIME_CAPTION = """\
The same over time, by schedule ({kind}): where training steps with uniform times are spent."""
ERRORS_CAPTION = """\
The least error of x0 as a share of what independent Gaussian elements of the same variance would leave, with twice
the standard errors. It lies above the curve of the set itself and below the others, and below 1, which is what the
best prediction with one factor for all elements leaves; where these meet, it is known. Curves that leave the picture
go on above it."""
LOGSNR_AXIS = "log-SNR      noise  ←  →  clean"
_MARKS = {
    "upper": {
        "filled": "the correlation; lowest upper bound of the variance,\nand the lower bound of the mean that it gives",
        "hollow": "lower bound of the variance,\nand the upper bound of the mean that it gives",
    },
    "exact": {"filled": "the correlation of the samples;\nmean and variance by the exact posterior"},
}
"""What markers are, by `Measured.shown`."""

TARGET_STYLE = {
    "eps": (BLUE, "-", "o"),
    "x0": (ORANGE, "--", "s"),
    "v": (GREEN, "-.", "^"),
    "score": (BLACK, ":", "D"),
    "u": (PURPLE, (0, (5, 1, 1, 1, 1, 1)), "v"),
    "k": (YELLOW, (0, (11, 2.5)), "P"),
}
SCHEDULE_STYLE = {
    "cosine": (BLUE, "-", "o"),
    "ddpm_linear": (SKY, "--", "s"),
    "sd_linear": (GREEN, "-.", "^"),
    "logsnr_linear": (PURPLE, ":", "D"),
    "flow": (ORANGE, (0, (11, 2.5)), "X"),
    "vp": (YELLOW, (0, (5, 1, 1, 1, 1, 1)), "v"),
    "gvp": (BLACK, (0, (1, 4)), "P"),
    "logsnr_uniform": (GREY, (0, (4, 1, 4, 1, 1, 1)), "*"),
}
_ERROR_STYLE = {
    "linear": (BLUE, "s--", "linear, the other half"),
    "left_out": (ORANGE, "^-.", "the other samples"),
    "in_set": (GREEN, "v:", "the set itself"),
    "exact": (BLACK, "o-", "exact posterior"),
}
_VARIANCE_LIMITS = (1e-4, 1e4)
_LIMITS = {"correlation": (-1.08, 1.08), "mean": (-0.05, 2.05), "variance": _VARIANCE_LIMITS}


_WIDE_MEAN = (-0.05, 100.0)
"""With data, whose score is larger than a Gaussian's where there is little noise."""


def draw_by_logsnr(curves: Mapping[str, Curves], data: Measured | None) -> Figure:
    """Rows are quantities, columns targets; a curve per schedule that differs from the others."""
    figure = new_figure(17.0, 8.6)
    grid = figure.subplots(3, len(TARGETS), sharex=True, sharey="row")
    preserving = [name for name in curves if preserves_variance(build_schedule(name))]
    distinct = [name for name in curves if name not in preserving[1:]]
    for row, (quantity, title) in zip(grid, QUANTITIES.items(), strict=True):
        for axes, target in zip(row, TARGETS, strict=True):
            for name in curves if target == "u" else distinct:
                _draw_over_logsnr(axes, curves[name], name, target, quantity, data if name in distinct else None)
            _limit(axes, quantity, data)
            axes.set_xlim(-13, 13)
        row[0].set_ylabel(title)
    for axes, target in zip(grid[0], TARGETS, strict=True):
        axes.set_title(target, fontsize=12)
    for axes in grid[-1]:
        axes.set_xlabel(LOGSNR_AXIS, fontsize=9)
    handles, names = grid[0][TARGETS.index("u")].get_legend_handles_labels()
    labels = [_legend_name(name, preserving) for name in names]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), handlelength=3.2, frameon=False)
    if data is not None:
        _explain_marks(figure, _MARKS[data.shown])
    return figure


def _legend_name(name: str, preserving: Iterable[str]) -> str:
    """The first of the schedules that share all curves but u's stands for them."""
    names = list(preserving)
    return f"{name} (but for u: all that preserve the variance)" if len(names) > 1 and name == names[0] else name


def _draw_over_logsnr(axes: Axes, curve: Curves, name: str, target: str, quantity: str, data: Measured | None) -> None:
    color, style, marker = SCHEDULE_STYLE[name]
    line = getattr(curve.gaussian[target], quantity)
    axes.plot(curve.place.logsnr, line, color=color, linestyle=style, linewidth=1.6, label=name)
    if data is not None:
        _mark(axes, curve.at.logsnr, curve.estimates[target], quantity, data.shown, color, marker, hollow=True)


def draw_by_time(curves: Mapping[str, Curves], data: Measured | None) -> Figure:
    """Rows are quantities, columns schedules; a curve per target."""
    figure = new_figure(1.5 + 4.0 * len(curves), 8.8)
    grid = figure.subplots(3, len(curves), sharex=True, sharey="row", squeeze=False)
    for row, (quantity, title) in zip(grid, QUANTITIES.items(), strict=True):
        for axes, curve in zip(row, curves.values(), strict=True):
            for target, (color, style, marker) in TARGET_STYLE.items():
                line = getattr(curve.gaussian[target], quantity)
                axes.plot(curve.place.time, line, color=color, linestyle=style, linewidth=1.6, label=target)
                if data is not None:
                    _mark(axes, curve.at.time, curve.estimates[target], quantity, data.shown, color, marker)
            _limit(axes, quantity, data)
            axes.set_xlim(-0.02, 1.02)
        row[0].set_ylabel(title)
    for axes, name in zip(grid[0], curves, strict=True):
        axes.set_title(name, fontsize=12)
    for axes in grid[-1]:
        axes.set_xlabel("time (1 is noise)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    columns = len(labels) if len(curves) > 1 else 3  # of a narrow figure
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, handlelength=3.2, frameon=False)
    if data is not None:
        _explain_marks(figure, {"filled": _MARKS[data.shown]["filled"]})
    return figure


def _explain_marks(figure: Figure, meanings: Mapping[str, str]) -> None:
    """Below the panels, in grey, since colours and shapes are those of the curves."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor="white" if fill == "hollow" else GREY)
        for fill in meanings
    ]
    figure.legend(handles, list(meanings.values()), loc="outside lower center", ncols=len(handles), frameon=False)


def _mark(
    axes: Axes,
    where: torch.Tensor,
    values: DataEstimates,
    quantity: str,
    shown: str,
    color: str,
    marker: str,
    *,
    hollow: bool = False,
) -> None:
    """Estimates with twice their standard errors; the other bound, where it is asked for, hollow."""
    for number, found in enumerate(_sides(values, quantity, shown)[: 2 if hollow else 1]):
        axes.errorbar(
            where,
            found.value,
            2.0 * found.error,
            fmt=marker,
            color=color,
            markersize=4.5,
            markerfacecolor="white" if number else color,
            elinewidth=1.0,
        )


def _sides(values: DataEstimates, quantity: str, shown: str) -> list[Estimate]:
    """What is shown, and the other bound where there are two."""
    if quantity == "correlation":
        return [values.correlation]
    found = values.variance if quantity == "variance" else {n: root(v) for n, v in values.mean_square.items()}
    if shown == "exact":
        return [found["exact"]]
    order = ("upper", "lower") if quantity == "variance" else ("lower", "upper")
    return [found[name] for name in order]


def _limit(axes: Axes, quantity: str, data: Measured | None) -> None:
    limits = _LIMITS[quantity]
    if quantity == "variance":
        axes.set_yscale("log")
    elif quantity == "mean" and data is not None:
        limits = _WIDE_MEAN
        axes.set_yscale("symlog", linthresh=1.0, linscale=2.0)
        axes.set_yticks([0.0, 0.5, 1.0, 10.0, 100.0], ["0", "0.5", "1", "10", "100"])
    axes.set_ylim(*limits)
    tidy(axes)


def draw_errors(data: Measured) -> Figure:
    """Each error of x0 over that of independent Gaussian elements, s^2/(1 + s^2 SNR)."""
    figure = new_figure(8.5, 5.0)
    axes = figure.subplots()
    logsnr = torch.tensor(LOGSNR, dtype=torch.float64)
    gaussian = data.variance / (1.0 + data.variance * logsnr.exp())
    for name, (color, style, label) in _ERROR_STYLE.items():
        if name in data.errors:
            value, error = (part / gaussian for part in estimate(data.errors[name]))
            axes.errorbar(logsnr, value, 2.0 * error, fmt=style, color=color, capsize=3, linewidth=1.6, label=label)
    axes.axhline(1.0, color=GREY, linewidth=1.4, label="one factor for all elements")
    axes.set_ylim(-0.03, 1.5)
    axes.set_xlabel(LOGSNR_AXIS)
    axes.set_ylabel("error of x0, as a share of the Gaussian's")
    axes.legend(frameon=False, loc="upper left")
    tidy(axes)
    return figure
