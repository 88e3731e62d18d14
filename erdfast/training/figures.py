"""Pictures of a run: sample grids, and one summary with the loss curve, the loss per noise level, samples, and what was
measured of these.

Matplotlib is used through its objects, not pyplot, so that nothing global changes and no display is needed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from erdfast.data.images import image_grid, save_image_grid
from erdfast.evaluation.measure import METRICS
from erdfast.figure_style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, save_figure, tidy

from .evaluation_records import best, comparable, values_of
from .metrics import LOGSNR_EDGES
from .target_figure import draw_target, has_learnt_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["save_image_grid", "save_summary"]

DISTANCES = {"fid": (BLUE, "o-"), "sfid": (ORANGE, "^:"), "fd": (BLUE, "o-")}
SHARES = {"accuracy": (GREEN, "s--"), "precision": (GREEN, "s--"), "recall": (PURPLE, "D-.")}
"""Metrics that one axis has room for, with colour and line."""

Record = Mapping[str, Any]


def save_summary(
    path: str | os.PathLike[str],
    metrics_records: Sequence[Record],
    images: np.ndarray | None,
    *,
    title: str,
    floor: Sequence[tuple[float, float]] | None = None,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    k_init: float | None = None,
) -> None:
    """Write one PNG that sums up a run; whatever is missing is said in its place.

    Args:
        path: the PNG, replaced atomically.
        metrics_records: records as in metrics.jsonl. Used: "step" and "loss" (a number or null), and, where
            present, "loss_by_logsnr" and "count_by_logsnr" (lists, one entry per bin) with "logsnr_edges" (by
            default `LOGSNR_EDGES`); evaluations, which have a panel of their own; and so has what a learnable target
            learnt: "k" (a number, or a list over time), or "k0" and "k1".
        images: (N, H, W, 1 or 3) uint8 samples, or None.
        title: one line above everything.
        floor: (log-SNR, least possible mean squared error) pairs, where the data's Bayes floor is known.
        columns, row_labels: as for `image_grid`.
        k_init: where a learnable target began, where that is known.

    Raises:
        ImportError: matplotlib or Pillow is missing.
        ValueError: images of another type, or lists whose length does not suit the edges.
    """
    grid = None if images is None else image_grid(images, columns=columns, row_labels=row_labels)
    learnt, evaluations = has_learnt_target(metrics_records), comparable(metrics_records)
    rows = 3 if learnt and evaluations else 2
    figure = new_figure(12.5, 3.3 * rows)
    figure.suptitle(title, fontsize=13)
    layout = figure.add_gridspec(rows, 2, width_ratios=[1.1, 1.0])
    _draw_loss(figure.add_subplot(layout[0, 0]), metrics_records)
    # A floor is that of one target: errors in earlier ones may lie below it.
    floor_label = "Bayes floor of the target at the end" if learnt else "Bayes floor (no model can be lower)"
    _draw_loss_by_logsnr(figure.add_subplot(layout[1, 0]), metrics_records, floor, floor_label)
    if learnt:  # below the samples, where nothing else is
        draw_target(figure.add_subplot(layout[2, 0] if evaluations else layout[1, 1]), metrics_records, k_init)
    _draw_samples(figure.add_subplot(layout[: rows - 1 if learnt or evaluations else rows, 1]), grid)
    if evaluations:
        _draw_evaluations(figure.add_subplot(layout[rows - 1, 1]), evaluations)

    figure.align_ylabels()
    save_figure(path, figure)


def smooth(values: Sequence[float] | np.ndarray, width: int) -> np.ndarray:
    """Centred moving average over `width` values (made odd), cut off at the ends. float64, same length.

    The window is cut on one side only: shrinking it on both would end every curve on one raw, noisy value.
    """
    series = np.asarray(values, dtype=np.float64)
    half = max(0, width // 2)
    sums = np.concatenate([[0.0], np.cumsum(series)])
    position = np.arange(len(series))
    first, beyond = np.maximum(position - half, 0), np.minimum(position + half + 1, len(series))
    return (sums[beyond] - sums[first]) / (beyond - first)


def _draw_loss(axes: Axes, records: Sequence[Record]) -> None:
    points = [(r["step"], r["loss"]) for r in records if _is_number(r.get("loss")) and _is_number(r.get("step"))]
    axes.set_title("Training loss", loc="left", fontsize=11)
    axes.set_xlabel("training step")
    axes.set_ylabel("weighted squared error")
    if not points:
        _say(axes, "no loss was recorded")
        return
    steps, losses = (np.asarray(column, dtype=np.float64) for column in zip(*points, strict=True))
    mean = smooth(losses, max(3, len(steps) // 20))
    marker = "." if len(steps) < 30 else ""  # a line through one point would be invisible
    axes.plot(steps, losses, color=GREY, marker=marker, linewidth=0.8, alpha=0.7, label="as logged")
    axes.plot(steps, mean, color=BLUE, marker=marker, linewidth=2, label=f"moving mean, last {mean[-1]:.4g}")
    if losses.min() > 0:
        _log_axis(axes, losses)
    axes.legend(frameon=False, fontsize=9)
    tidy(axes)


def _draw_loss_by_logsnr(
    axes: Axes, records: Sequence[Record], floor: Sequence[tuple[float, float]] | None, floor_label: str
) -> None:
    axes.set_title("Loss per noise level", loc="left", fontsize=11)
    axes.set_xlabel("log-SNR, ln(α²/σ²)      noisy  ←  →  clean")
    axes.set_ylabel("squared error per element")
    binned = [record for record in records if record.get("loss_by_logsnr") is not None]
    drawn = []
    for part, color, style in _early_and_late(binned):
        edges, means = _pool(part)
        centers = (edges[1:] + edges[:-1]) / 2
        known = np.isfinite(means)
        axes.plot(centers[known], means[known], style, color=color, linewidth=1.8, markersize=5, label=_span(part))
        drawn.append(means[known])
    if floor:
        levels, values = (np.asarray(column, dtype=np.float64) for column in zip(*sorted(floor), strict=True))
        axes.plot(levels, values, "--", color=BLACK, linewidth=1.4, label=floor_label)
        drawn.append(values)
    if not drawn:
        _say(axes, "no loss per noise level was recorded")
        return
    everything = np.concatenate(drawn)
    if everything.size and everything.min() > 0:
        _log_axis(axes, everything)
    if binned:
        edges = _edges(binned[-1])
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xticks(np.linspace(edges[0], edges[-1], 5))
    axes.legend(frameon=False, fontsize=9)
    tidy(axes)


def _draw_samples(axes: Axes, grid: Any) -> None:
    axes.set_title("Samples", loc="left", fontsize=11)
    axes.set_axis_off()
    axes.set_anchor("NW")
    if grid is None:
        _say(axes, "no samples were drawn")
    else:
        axes.imshow(np.asarray(grid), interpolation="antialiased")


def _draw_evaluations(axes: Axes, evaluations: Sequence[Record]) -> None:
    """Distances on the left axis, shares on the right one."""
    chosen, num = best(evaluations), evaluations[-1].get("settings", {}).get("num", 0)
    title = f"Evaluation of {num:,} images" + (f", best {chosen.value} at step {chosen.step:,}" if chosen else "")
    axes.set_title(title, loc="left", fontsize=11, pad=22)
    axes.set_xlabel("training step")
    axes.margins(y=0.12)
    names = list(values_of(evaluations[-1]))
    # The Inception score is of another scale than all others: it is drawn where nothing else is.
    distances = [name for name in names if name in DISTANCES] or [name for name in names if name == "is"]
    shares = [name for name in names if name in SHARES]
    drawn = [_draw_metric(axes, evaluations, name, *DISTANCES.get(name, (BLUE, "o-"))) for name in distances]
    axes.set_ylabel(" and ".join(METRICS[name].title for name in distances))
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")  # else a factor stands where the legend is
    values = np.asarray([values_of(record).get(name, math.nan) for record in evaluations for name in distances])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 3 * values.min():
        _log_axis(axes, values)
    axes.set_xlim(0, 1.03 * evaluations[-1]["step"])
    tidy(axes)
    if shares:
        right = axes.twinx()
        drawn += [_draw_metric(right, evaluations, name, *SHARES[name], factor=100.0) for name in shares]
        right.set_ylim(0, 103)
        right.set_ylabel(" and ".join(METRICS[name].title for name in shares) + ", %")
        right.spines["top"].set_visible(False)
    # Between title and curves: within these it would hide some.
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.98), "ncols": 4}
    axes.legend(handles=drawn, frameon=False, fontsize=9, **place)


def _draw_metric(
    axes: Axes, evaluations: Sequence[Record], name: str, color: str, style: str, factor: float = 1.0
) -> Any:
    points = [(record["step"], values_of(record).get(name, math.nan)) for record in evaluations]
    steps, values = (np.asarray(column, dtype=np.float64) for column in zip(*points, strict=True))
    known = np.isfinite(values)
    (line,) = axes.plot(
        steps[known], factor * values[known], style, color=color, linewidth=1.8, markersize=5, label=METRICS[name].title
    )
    return line


def _early_and_late(records: Sequence[Record]) -> list[tuple[Sequence[Record], str, str]]:
    """The first and the last tenth of the records; one curve alone where there are fewer than two."""
    if len(records) < 2:
        return [(records, BLUE, "o-")] if records else []
    tenth = math.ceil(len(records) / 10)
    return [(records[:tenth], ORANGE, "^:"), (records[-tenth:], BLUE, "o-")]


def _pool(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Edges and mean per bin over several records, weighted by the number of samples; NaN where there are
    none."""
    edges = _edges(records[-1])
    sums, counts = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    for record in records:
        means = np.asarray([np.nan if mean is None else mean for mean in record["loss_by_logsnr"]], dtype=np.float64)
        weights = np.asarray(record.get("count_by_logsnr", np.ones(len(means))), dtype=np.float64)
        if not len(means) == len(weights) == len(edges) - 1:
            raise ValueError(
                f"{len(edges)} edges of log-SNR need {len(edges) - 1} losses and counts, "
                f"got {len(means)} and {len(weights)} (step {record.get('step')})"
            )
        used = np.isfinite(means) & (weights > 0)
        sums[used] += means[used] * weights[used]
        counts[used] += weights[used]
    return edges, np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _edges(record: Record) -> np.ndarray:
    return np.asarray(record.get("logsnr_edges", LOGSNR_EDGES), dtype=np.float64)


def _span(records: Sequence[Record]) -> str:
    first, last = records[0].get("step"), records[-1].get("step")
    return f"step {last:,}" if first == last else f"steps {first:,} to {last:,}"


def _log_axis(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic y axis with plain numbers; the narrower the range, the more multiples of a decade are
    shown."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    decades = math.log10(values.max() / values.min())
    if decades < 0.1:
        axes.set_ylim(values.min() / 1.5, values.max() * 1.5)
    fine = tuple(float(digit) for digit in range(1, 10))
    subs = fine if decades < 0.8 else (1.0, 2.0, 5.0) if decades < 2 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#666666")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
