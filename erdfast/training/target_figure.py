"""The panel of a learnable target (k-Diff): k, or k0 and k1, over the steps; or k over time at the end of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from erdfast.figure_style import BLACK, BLUE, GREY, ORANGE, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
CURVES = {
    "k": ("k", BLUE, "-"),
    "k0": ("k₀, factor of the data", BLUE, "-"),
    "k1": ("k₁, factor of the noise", ORANGE, "-."),
}
"""Label, colour and line of each learnt number."""
NAMED = {0.0: "eps", 0.5: "v", 1.0: "x0"}
"""What the network predicts, up to a factor, where k is this; k0 and k1 have no such names."""
LEAST_SPAN = 0.1
"""Of the k axis: a target that hardly moved must not look as if it had."""


def has_learnt_target(records: Sequence[Record]) -> bool:
    """Whether any record holds what a learnable target learnt."""
    return any(_is_learnt(record, name) for record in records for name in CURVES)


def draw_target(axes: Axes, records: Sequence[Record], k_init: float | None) -> None:
    """Draw the panel.

    Args:
        records: as in metrics.jsonl; at least one has "k" (a number, or a list over time), or "k0" and "k1".
        k_init: where it began, drawn as a dashed line; None where that is not known.
    """
    learnt = [record for record in records if any(_is_learnt(record, name) for name in CURVES)]
    over_time = isinstance(learnt[-1].get("k"), list)
    shown = _draw_over_time(axes, learnt[-1]) if over_time else _draw_over_steps(axes, learnt)
    if k_init is not None:
        axes.axhline(k_init, linestyle="--", color=BLACK, linewidth=1.2, label=f"start, {k_init:g}")
        shown = np.append(shown, k_init)
    middle, span = (shown.max() + shown.min()) / 2, max(1.3 * (shown.max() - shown.min()), LEAST_SPAN)
    low, high = max(middle - span / 2, -0.02), min(middle + span / 2, 1.02)
    axes.set_ylim(low, high)
    axes.set_ylabel("k" if "k" in learnt[-1] else "k₀, k₁")
    for value, name in NAMED.items() if "k" in learnt[-1] else ():
        if low <= value <= high:
            axes.axhline(value, color=GREY, linewidth=0.8, linestyle=":")
            axes.annotate(f" {name}", (1.0, value), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    tidy(axes)


def _draw_over_steps(axes: Axes, records: Sequence[Record]) -> np.ndarray:
    axes.set_title("Learnt target", loc="left", fontsize=11)
    axes.set_xlabel("training step")
    shown = []
    for name, (label, color, style) in CURVES.items():
        points = [(record["step"], record[name]) for record in records if _is_learnt(record, name)]
        if points:
            steps, values = (np.asarray(column, dtype=np.float64) for column in zip(*points, strict=True))
            marker = "." if len(steps) < 30 else ""
            label = f"{label}, last {values[-1]:.4g}"
            axes.plot(steps, values, style, color=color, marker=marker, linewidth=2, label=label)
            shown.append(values)
    return np.concatenate(shown)


def _draw_over_time(axes: Axes, record: Record) -> np.ndarray:
    axes.set_title(f"Learnt target over time at step {record['step']:,}", loc="left", fontsize=11)
    axes.set_xlabel("time t      clean  ←  →  noise")
    values = np.asarray(record["k"], dtype=np.float64)
    times = np.linspace(0.0, 1.0, len(values))
    axes.plot(times, values, color=BLUE, linewidth=2, label=f"k(t), {values.min():.4g} to {values.max():.4g}")
    axes.set_xlim(0.0, 1.0)
    return values


def _is_learnt(record: Record, name: str) -> bool:
    value = record.get(name)
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(number, (int, float)) and math.isfinite(number) for number in values)
