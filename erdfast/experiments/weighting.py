"""`python -m erdfast.experiments.weighting --out DIR`: what a loss weighting changes, where the best possible is known.

Mixtures of 40 modes have a closed-form posterior: how far a network is from the best prediction is exact at every noise
level, and so is the distribution that samples are compared with. A small DiT and a small U-ViT are trained on them with
each weighting, target and several seeds; and a DiT on the digits. Every cell is a file of its own in DIR/cells, so
that a run that is stopped goes on where it was; results.json, weighting*.png and weighting.md sum them up. results.json
holds all that the cells do: without DIR/cells they are taken from there, so that a copy of it is enough for a report.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from erdfast import cli
from erdfast.atomic import write_text
from erdfast.cells import is_of, put_aside, read_cell, run_missing
from erdfast.training.run_directory import describe_environment

from .weighting_cells import IN_PAPER, TARGETS, USUAL, WEIGHTINGS, Cell, run_cell
from .weighting_statistics import check_result

STD = 0.4
"""Spread within a mode, if not varied."""
Study = dict[str, Any]
SMALL: Study = {"data": "mixture_4x8x8", "steps": 800, "batch": 64}
LARGE: Study = {"data": "mixture_4x32x32", "steps": 600, "batch": 16, "samples": 250}
STUDIES: dict[str, list[Study]] = {
    "cpu": [
        {**SMALL, "std": STD, "network": "dit", "weightings": tuple(WEIGHTINGS)},
        {**SMALL, "std": STD, "network": "uvit", "weightings": tuple(WEIGHTINGS)},
        {**LARGE, "std": STD, "network": "dit"},
        {"data": "digits", "std": 0.0, "network": "dit", "steps": 1200, "batch": 64},
        {**LARGE, "std": STD, "network": "uvit"},
        {**SMALL, "std": 0.2, "network": "dit", "weightings": IN_PAPER},
        {**SMALL, "std": 0.7, "network": "dit", "weightings": IN_PAPER},
    ],
    "gpu": [
        {"data": "mixture_4x32x32", "std": STD, "network": "dit_s2", "steps": 1000, "batch": 128, "samples": 1000},
    ],
}
"""By scale, in order of interest: each with every target and, if not named otherwise, all of USUAL."""
SEEDS = {"cpu": (0, 1, 2), "gpu": (0, 1, 2, 3, 4)}
QUICK: list[Study] = [
    {"data": "mixture_4x8x8", "std": STD, "network": "dit", "steps": 40, "batch": 32, "samples": 40},
    {"data": "digits", "std": 0.0, "network": "dit", "steps": 40, "batch": 32, "samples": 40},
]


@dataclass(frozen=True, kw_only=True)
class WeightingConfig:
    """Train with each loss weighting on problems whose best possible prediction is known, and compare."""

    out: Path
    """Folder of the results; cells that are there already are kept."""
    scale: Literal["cpu", "gpu"] = "cpu"
    """cpu: small networks, hours on two cores. gpu: networks of DiT-S/2's size on 4x32x32, five seeds."""
    quick: bool = False
    """A few short cells: shows that it works, in two minutes; its numbers mean little."""
    workers: int = 2
    """Processes, of one thread each; they share a GPU."""
    only_report: bool = False
    """Train nothing: sum up what is in the folder's cells, or in its results.json."""

    def validate(self) -> None:
        """Raise ValueError for options out of range or that do not go together."""
        if not 1 <= self.workers <= 64:
            raise ValueError(f"workers is {self.workers}; it must be at least 1 and at most 64")
        if self.quick and self.scale == "gpu":
            raise ValueError("--quick is of --scale cpu; leave one of them out")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run what is missing, sum up; returns the exit code."""
    from .weighting_report import write_report

    config = cli.parse(WeightingConfig, argv, program="erdfast.experiments.weighting")
    config.validate()
    cells, folder = list(planned_cells(config.scale, quick=config.quick)), config.out / "cells"
    restore(cells, config.out)
    if not config.only_report:
        run_missing(run_cell, cells, folder, config.workers, check_result)
    found = [result for cell in cells if (result := read_cell(folder, cell, check_result)) is not None]
    unusable = sum((folder / f"{cell.name}.json").exists() for cell in cells) - len(found)
    if unusable:
        print(f"{folder}: {unusable} files are damaged or of other settings, and left out", file=sys.stderr)
    found, diverged = [c for c in found if c["curve"]], [c for c in found if not c["curve"]]
    if not found:
        reason = "every network has diverged" if diverged else "leave --only-report out"
        raise ValueError(f"{folder} holds no cell of this experiment to be summed up: {reason}")
    extra = " --quick" if config.quick else "" if config.scale == "cpu" else f" --scale {config.scale}"
    command = f"python -m erdfast.experiments.weighting --out {config.out}{extra}"
    results = {
        "date": date.today().isoformat(),
        "environment": describe_environment() | {"command": command},
        "planned": len(cells),
        "diverged": [f"{c['data']} {c['network']} {c['target']} {c['weighting']} seed {c['seed']}" for c in diverged],
        "cells": found,
    }
    write_text(config.out / "results.json", json.dumps(results, separators=(",", ":")) + "\n")
    names = write_report(results, config.out)
    print(f"written: {config.out}/results.json, {', '.join(names)}")
    return 0


def restore(cells: Sequence[Cell], out: Path) -> None:
    """Make the files of cells that results.json alone holds; a damaged file is put aside for what is recorded.

    Raises:
        ValueError: results.json is damaged, or holds cells of another plan, which a new report would not.
    """
    path = out / "results.json"
    if not path.exists():
        return
    try:
        recorded = {_cell_name(result): result for result in json.loads(path.read_text())["cells"]}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): move it away") from None
    ours = {cell.name: cell for cell in cells}
    others = [name for name, result in recorded.items() if name not in ours or not is_of(result, ours[name])]
    if others:
        raise ValueError(f"{path} sums up another plan ({others[0]}, ...), and would be lost: choose another --out")
    folder = out / "cells"
    for name, result in recorded.items():
        if read_cell(folder, ours[name], check_result) is None:
            put_aside(folder / f"{name}.json")
            write_text(folder / f"{name}.json", json.dumps(result) + "\n")


def _cell_name(result: dict[str, Any]) -> str:
    return Cell(**{field.name: result[field.name] for field in dataclasses.fields(Cell)}).name


def planned_cells(scale: str, *, quick: bool = False) -> Iterator[Cell]:
    """Each once: study after study, within it seed after seed."""
    for study in QUICK if quick else STUDIES[scale]:
        settings = dict(study)
        weightings = settings.pop("weightings", USUAL)
        for seed in (0,) if quick else SEEDS[scale]:
            for target in TARGETS[:1] if quick else TARGETS:
                for weighting in ("constant", "erd") if quick else weightings:
                    yield Cell(**settings, target=target, weighting=weighting, seed=seed)


if __name__ == "__main__":
    cli.run(main, "erdfast.experiments.weighting")
