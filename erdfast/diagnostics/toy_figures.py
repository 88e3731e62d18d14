"""The toy's figures, one for each process, with a panel or a row of panels for each target; from numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from erdfast.figure_style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, tidy

from .toy_findings import Trained
from .toy_measures import BINS, COUPLING_TIMES, FEATURE_TIMES, GRAM_TIMES, KERNEL_TIMES, LEVELS, PREDICTION_TIMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ByTarget = Mapping[str, Trained]
MODES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"))
"""Colour and marker of each mode."""
TOPS = (("largest eigenvalue", BLUE, "-"), ("second", ORANGE, "--"), ("third", GREEN, ":"))
TIME = "t (0 data, 1 noise)"


def draw_losses(by_target: ByTarget) -> Figure:
    """Above: error and floor. Below: the excess of the network of all times and of those of bins."""
    figure = new_figure(16.0, 7.6)
    rows = figure.subplots(2, len(by_target), sharex=True, sharey="row")
    for (target, it), above, below in zip(by_target.items(), *rows, strict=True):
        above.plot(LEVELS, it.curve("floor"), color=BLACK, linewidth=2.4, label="Bayes floor")
        above.plot(LEVELS, it.curve("loss"), color=BLUE, linestyle="--", linewidth=1.6, label="one network")
        above.plot(LEVELS, it.curve("bins_loss"), ".", color=ORANGE, markersize=6, label="networks of bins")
        below.plot(LEVELS, it.curve("excess"), color=BLUE, linestyle="--", linewidth=1.6)
        below.plot(LEVELS, it.curve("bins_excess"), ".-", color=ORANGE, markersize=6, linewidth=1.0)
        early = below.plot(LEVELS, it.curve("early_excess"), "x:", color=GREEN, markersize=5, linewidth=1.0)
        early[0].set_label("networks of bins, as many samples in all")
        above.set_title(f"{target}: error", loc="left", fontsize=11)
        below.set_title(f"{target}: excess over the floor", loc="left", fontsize=11)
        below.set_xlabel(TIME)
        for axes in (above, below):
            axes.set_yscale("log")
            for edge in range(1, BINS):
                axes.axvline(edge / BINS, color=GREY, linewidth=0.6)
            tidy(axes)
    for row in rows:
        row[0].set_ylabel("mean squared error per element")
    _legend_below(figure, [rows[0][0], rows[1][0]])
    return figure


def draw_phases(by_target: ByTarget) -> Figure:
    """Norms of what can be predicted and of what cannot; the diagonal parts the two."""
    figure = new_figure(16.0, 4.4)
    panels = figure.subplots(1, len(by_target))
    for (target, it), axes in zip(by_target.items(), panels, strict=True):
        phases = it.whole["phases"]
        x = [value for phase in phases for value in phase["signals"]]
        y = [value for phase in phases for value in phase["noises"]]
        time = [phase["time"] for phase in phases for _ in phase["signals"]]
        axes.scatter(x, y, c=time, s=7, alpha=0.55, cmap="viridis", vmin=0, vmax=1, linewidths=0)
        path = ([phase["signal"] for phase in phases], [phase["noise"] for phase in phases])
        axes.plot(
            *path, "o-", color=BLACK, markersize=4.5, linewidth=1.4, label="root mean square, t from 0.02 to 0.98"
        )
        axes.plot(path[0][0], path[1][0], "o", color="white", markeredgecolor=BLACK, markersize=8, label="t = 0.02")
        end = 1.05 * max(*x, *y)
        axes.plot([0, end], [0, end], color=ORANGE, linestyle="--", linewidth=1.4, label="half of it noise")
        axes.set(xlim=(0, end), ylim=(0, end), aspect="equal")
        axes.set_title(target, loc="left", fontsize=11)
        axes.set_xlabel("|E[y | x_t]|, predictable")
        tidy(axes)
    panels[0].set_ylabel("|y - E[y | x_t]|, not predictable")
    figure.colorbar(panels[0].collections[0], ax=panels, label=TIME, shrink=0.85)
    _legend_below(figure, [panels[0]])
    return figure


def draw_features(by_target: ByTarget) -> Figure:
    """Hidden features by time in the plane of the first time, coloured by mode."""

    def draw(axes: Axes, found: dict[str, Any]) -> None:
        _cloud(axes, found["x"], found["mode"], size=10)
        text = f"spread {found['spread']:.2f}\nprobe {found['probe']:.0%} of {found['best']:.0%}"
        axes.set_title(text, fontsize=9, loc="right")

    return _grid(by_target, FEATURE_TIMES, "features", draw, ("first component at t = 0.1", "second"))


def draw_predictions(by_target: ByTarget) -> Figure:
    """What the network predicts and what is best, by time, coloured by the mode that a point comes from."""

    def draw(axes: Axes, found: dict[str, Any]) -> None:
        axes.plot(
            *found["best"], "o", color=GREY, markersize=5, markeredgewidth=0.6, fillstyle="none", label="E[y | x_t]"
        )
        _cloud(axes, found["network"], found["mode"], size=9)
        axes.set_title(f"distance {found['distance']:.2g}", fontsize=9, loc="right")

    return _grid(by_target, PREDICTION_TIMES, "predictions", draw, ("first element of y", "second"))


def draw_spectra(by_target: ByTarget) -> Figure:
    """Above: the kernel's largest eigenvalues. Below: its effective rank. Grey: the untrained network."""
    figure = new_figure(16.0, 7.2)
    rows = figure.subplots(2, len(by_target), sharex=True, sharey="row")
    for (target, it), above, below in zip(by_target.items(), *rows, strict=True):
        trained, start = it.whole["kernels"]["trained"], it.whole["kernels"]["start"]
        for number, (label, color, style) in enumerate(TOPS):
            values = [top[number] for top in trained["top"]]
            above.plot(KERNEL_TIMES, values, color=color, linestyle=style, linewidth=1.8, label=label)
        untrained = [top[0] for top in start["top"]]
        above.plot(KERNEL_TIMES, untrained, color=GREY, linestyle="-.", linewidth=1.4, label="largest, untrained")
        below.plot(KERNEL_TIMES, trained["rank"], ".-", color=BLUE, linewidth=1.8, label="effective rank")
        below.plot(KERNEL_TIMES, start["rank"], color=GREY, linestyle="-.", linewidth=1.4, label="rank, untrained")
        above.set_yscale("log")
        above.set_title(f"{target}: eigenvalues", loc="left", fontsize=11)
        below.set_title(f"{target}: effective rank", loc="left", fontsize=11)
        below.set_xlabel(TIME)
        tidy(above)
        tidy(below)
    rows[0][0].set_ylabel("eigenvalue over number of points")
    rows[1][0].set_ylim(bottom=0)
    rows[1][0].set_ylabel("effective rank")
    _legend_below(figure, [rows[0][0], rows[1][0]])
    return figure


def draw_grams(by_target: ByTarget) -> Figure:
    """Cosines of the Jacobians of points, ordered by mode, at a low and a high noise level."""
    figure = new_figure(14.0, 7.2)
    rows = figure.subplots(len(GRAM_TIMES), len(by_target))
    for row, time in zip(range(len(GRAM_TIMES)), GRAM_TIMES, strict=True):
        for (target, it), axes in zip(by_target.items(), rows[row], strict=True):
            gram = it.whole["kernels"]["grams"][row]["gram"]
            axes.imshow(gram, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            edges = [number * len(gram) / 4 - 0.5 for number in range(1, 4)]
            middles = [(number + 0.5) * len(gram) / 4 - 0.5 for number in range(4)]
            axes.hlines(edges, -0.5, len(gram) - 0.5, color=BLACK, linewidth=0.5)
            axes.vlines(edges, -0.5, len(gram) - 0.5, color=BLACK, linewidth=0.5)
            axes.set_xticks(middles, ["1", "2", "3", "4"])
            axes.set_yticks(middles, ["1", "2", "3", "4"])
            axes.tick_params(length=0)
            axes.set_title(f"{target}, t = {time}", loc="left", fontsize=11)
        rows[row][0].set_ylabel("points by mode")
    figure.colorbar(rows[0][0].images[0], ax=rows, label="cosine of the Jacobians", shrink=0.8)
    return figure


def draw_couplings(by_target: ByTarget) -> Figure:
    """How much two times share the directions in which they move the parameters."""
    figure = new_figure(16.0, 4.2)
    panels = figure.subplots(1, len(by_target))
    half = 0.5 / len(COUPLING_TIMES)
    extent = (COUPLING_TIMES[0] - half, COUPLING_TIMES[-1] + half) * 2
    for (target, it), axes in zip(by_target.items(), panels, strict=True):
        values = it.whole["kernels"]["coupling"]["cosine"]
        axes.imshow(values, cmap="viridis", vmin=0, vmax=1, origin="lower", extent=extent)
        axes.set_title(target, loc="left", fontsize=11)
        axes.set_xlabel("t of a step")
    panels[0].set_ylabel("t of the predictions it moves")
    figure.colorbar(panels[0].images[0], ax=panels, label="cosine of J'J at the two times", shrink=0.85)
    return figure


def _grid(
    by_target: ByTarget,
    times: tuple[float, ...],
    key: str,
    draw: Callable[[Axes, dict[str, Any]], None],
    labels: tuple[str, str],
) -> Figure:
    """A row for each target with a panel for each time, all of a row to one scale."""
    figure = new_figure(3.1 * len(times), 3.0 * len(by_target) + 0.5)
    rows = figure.subplots(len(by_target), len(times), sharex="row", sharey="row", squeeze=False)
    for (target, it), row in zip(by_target.items(), rows, strict=True):
        for axes, found in zip(row, it.whole[key], strict=True):
            draw(axes, found)
            axes.set_title(f"{target}, t = {found['time']}", fontsize=10, loc="left")
            tidy(axes)
        row[0].set_ylabel(labels[1])
    for axes in rows[-1]:
        axes.set_xlabel(labels[0])
    _legend_below(figure, [rows[0][0]])
    return figure


def _cloud(axes: Axes, points: list[list[float]], mode: list[int], size: float) -> None:
    at, number = torch.tensor(points), torch.tensor(mode)
    for index, (color, marker) in enumerate(MODES):
        own = at[:, number == index].tolist()
        axes.scatter(*own, s=size, c=color, marker=marker, alpha=0.7, linewidths=0, zorder=3, label=f"mode {index + 1}")


def _legend_below(figure: Figure, panels: list[Axes]) -> None:
    """One legend for all panels, outside of them."""
    handles, names = [], []
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            if name not in names:
                handles.append(handle)
                names.append(name)
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=10)
