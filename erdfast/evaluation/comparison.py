"""Several sets of samples side by side: a table, a record in JSON, and a picture of each metric against a number.

The number (guidance, training step, sampler steps) is given, or the one in which the file names differ.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erdfast.atomic import write_text
from erdfast.figure_style import BLUE, new_figure, save_figure, tidy

from .measure import METRICS

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One set of samples."""

    file: Path
    count: int
    values: dict[str, float]
    """By metric; the same metrics in every row."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What the sets differ in."""

    label: str
    places: tuple[float, ...]
    """One per set."""


def axis_of(files: Sequence[Path], given: Sequence[float] = (), label: str | None = None) -> Axis | None:
    """The axis of a comparison; None if nothing tells.

    Args:
        files: the sets.
        given: their places; by default the single number in which the names differ, as in cfg1.35.npz, cfg1.5.npz.
        label: its name; by default the word before that number, or "x".

    Raises:
        ValueError: as many places given as there are not files, or places that are not finite.
    """
    if given:
        if len(given) != len(files):
            raise ValueError(f"--x has {len(given)} values for {len(files)} files of samples: give one each")
        if not all(math.isfinite(place) for place in given):
            raise ValueError(f"--x must be finite numbers, got {' '.join(map(str, given))}")
        return Axis(label=label or "x", places=tuple(given))
    parts = [_NUMBER.split(file.stem) for file in files]
    if len(files) < 2 or len({tuple(part[::2]) for part in parts}) > 1:
        return None
    varying = [place for place in range(1, len(parts[0]), 2) if len({part[place] for part in parts}) > 1]
    if len(varying) != 1:
        return None
    word = re.findall(r"[A-Za-z]+", parts[0][varying[0] - 1])
    return Axis(label=label or (word[-1] if word else "x"), places=tuple(float(part[varying[0]]) for part in parts))


def format_table(rows: Sequence[Row], axis: Axis | None = None) -> str:
    """Aligned text, a row per set and a column per metric; the best value of several rows is marked with *."""
    metrics = list(rows[0].values)
    best = {name: _best(rows, name) for name in metrics}
    table = [["samples", "number ", *([f"{axis.label} "] if axis else []), *(f"{METRICS[m].title} " for m in metrics)]]
    for number, row in enumerate(rows):
        place = [f"{axis.places[number]:g} "] if axis else []
        marks = ["*" if best[name] == number else " " for name in metrics]
        values = [f"{row.values[m]:.{METRICS[m].decimals}f}{mark}" for m, mark in zip(metrics, marks, strict=True)]
        table.append([str(row.file), f"{row.count:,} ", *place, *values])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in table]
    return "\n".join(line.rstrip() for line in lines)


def _best(rows: Sequence[Row], metric: str) -> int | None:
    """Which of several rows is the best."""
    if len(rows) < 2:
        return None
    sign = 1.0 if METRICS[metric].better == "lower" else -1.0
    return min(range(len(rows)), key=lambda number: sign * rows[number].values[metric])


def save_record(path: Path, rows: Sequence[Row], axis: Axis | None, notes: dict[str, Any]) -> None:
    """Write JSON: the notes, and `samples`, a list with file, number, place and metrics of each set.

    Raises:
        OSError: it cannot be written.
    """
    samples = []
    for number, row in enumerate(rows):
        place = {"x": axis.places[number]} if axis else {}
        samples.append({"file": str(row.file), "count": row.count, **place, **row.values})
    content = {**notes, **({"x_label": axis.label} if axis else {}), "samples": samples}
    write_text(path, json.dumps(content, indent=2) + "\n")


def save_plot(path: str | os.PathLike[str], rows: Sequence[Row], axis: Axis | None) -> None:
    """Write a PNG with a panel per metric, against the axis or, without one, by name.

    Raises:
        ImportError: matplotlib is missing.
        OSError: it cannot be written.
    """
    metrics = list(rows[0].values)
    figure = new_figure(max(4.5, 3.6 * len(metrics)), 3.6)
    for number, metric in enumerate(metrics):
        _draw(figure.add_subplot(1, len(metrics), number + 1), rows, metric, axis)
    save_figure(path, figure)


def _draw(axes: Any, rows: Sequence[Row], metric: str, axis: Axis | None) -> None:
    """One panel; the best point is a filled one."""
    places = axis.places if axis else tuple(map(float, range(len(rows))))
    order = sorted(range(len(rows)), key=lambda number: places[number])
    values = [rows[number].values[metric] for number in order]
    x = [places[number] for number in order]
    line = "o-" if axis else "o"
    axes.plot(x, values, line, color=BLUE, linewidth=1.8, markersize=6, markerfacecolor="white")
    best = _best(rows, metric)
    if best is not None:
        axes.plot([places[best]], [rows[best].values[metric]], "o", color=BLUE, markersize=7)
    axes.set_title(f"{METRICS[metric].title} ({METRICS[metric].better} is better)", loc="left", fontsize=11)
    if axis:
        axes.set_xlabel(axis.label)
    else:
        names = [rows[number].file.stem for number in order]
        axes.set_xticks(x, names, rotation=20, ha="right", fontsize=8)
        axes.margins(x=0.15)
    tidy(axes)
