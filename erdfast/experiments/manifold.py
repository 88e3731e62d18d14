"""`python -m erdfast.experiments.manifold --out DIR`: where a learnable target settles on data of known dimension.

On subspaces and tori of intrinsic dimension d in D = 64 dimensions: where k settles, against D/(D+d) of the linear
theory (k-Diff, theorem 3.2), and what a grid of fixed k reaches in the same training. Every cell is a file of its own
in DIR/cells, so that a run that is stopped goes on where it was; results.json, manifold.png, manifold.md sum them up.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from erdfast import cli
from erdfast.atomic import write_text
from erdfast.training.run_directory import describe_environment

from .linear_theory import k_star
from .manifold_cells import Cell, run_cell

DIMS = {"subspace": (1, 2, 4, 8, 16, 32, 64), "torus": (1, 2, 4, 8, 16)}
GRID_DIMS = {"subspace": (4, 64), "torus": (4,)}
"""Where fixed targets are trained too."""
FIXED_K = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS = (0, 1, 2)
LEARNT = {
    ("mlp", "u"): ("subspace", "torus"),
    ("mlp", "target"): ("subspace", "torus"),
    ("linear", "target"): ("subspace",),
    ("mlp", "u_unclipped"): ("subspace",),
}
"""(network, loss) with which k is learnt, and on what."""
QUICK_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class ManifoldConfig:
    """Learn the prediction target on data of known intrinsic dimension, and compare it with the theory and with fixed
    targets."""

    out: Path
    """Folder of the results; cells that are there already are kept."""
    quick: bool = False
    """A few short cells: shows that it works, in two minutes; its numbers mean little."""
    workers: int = 2
    """Processes, of one thread each."""

    def validate(self) -> None:
        """Raise ValueError for a number out of range."""
        if not 1 <= self.workers <= 64:
            raise ValueError(f"workers is {self.workers}; it must be at least 1 and at most 64")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run what is missing, sum up; returns the exit code."""
    from .manifold_report import write_report

    config = cli.parse(ManifoldConfig, argv, program="erdfast.experiments.manifold")
    config.validate()
    cells = list(planned_cells(quick=config.quick))
    run_missing(cells, config.out / "cells", config.workers)
    found = [read_cell(config.out / "cells", cell) for cell in cells]
    command = f"python -m erdfast.experiments.manifold --out {config.out}{' --quick' if config.quick else ''}"
    environment = describe_environment() | {"command": command}
    results = {"date": date.today().isoformat(), "environment": environment, "cells": found}
    write_text(config.out / "results.json", json.dumps(results, separators=(",", ":")) + "\n")
    write_report(results, config.out)
    print(f"written: {config.out}/results.json, manifold.png, manifold.md")
    return 0


def planned_cells(*, quick: bool) -> Iterator[Cell]:
    """Each once, seed after seed."""
    steps = QUICK_STEPS if quick else Cell.steps
    dims = {"subspace": (2, 32), "torus": (2,)} if quick else DIMS
    for seed in (0,) if quick else SEEDS:
        for (network, loss), manifolds in LEARNT.items():
            for manifold in manifolds:
                for dim in dims[manifold]:
                    yield Cell(manifold=manifold, dim=dim, network=network, loss=loss, k=None, seed=seed, steps=steps)
        for manifold in dims:
            for dim in dims[manifold][:1] if quick else GRID_DIMS[manifold]:
                for k in sorted({*FIXED_K, k_star(Cell.ambient, dim)}):
                    yield Cell(manifold=manifold, dim=dim, network="mlp", loss="u", k=k, seed=seed, steps=steps)


def run_missing(cells: Sequence[Cell], folder: Path, workers: int) -> int:
    """Run the cells that have no file yet, each in a process of one thread; returns how many there were.

    Raises:
        OSError: a result cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if read_cell(folder, cell) is None]
    context = multiprocessing.get_context("spawn")  # threads of this process would not survive a fork
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [pool.submit(_run_and_write, cell, folder) for cell in missing]
        try:
            for job in tqdm(as_completed(jobs), total=len(cells), initial=len(cells) - len(jobs), unit="cell"):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(missing)


def _run_and_write(cell: Cell, folder: Path) -> None:
    write_text(folder / f"{cell.name}.json", json.dumps(rounded(run_cell(cell))) + "\n")


def rounded(value: Any) -> Any:
    """Floats to six significant digits: what is beyond depends on the machine."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return {key: rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


def read_cell(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a cell; None if there is none, or one of other settings."""
    try:
        found = json.loads((folder / f"{cell.name}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    wanted = rounded(dataclasses.asdict(cell))
    same = isinstance(found, dict) and all(found.get(name) == value for name, value in wanted.items())
    return found if same else None


if __name__ == "__main__":
    cli.run(main, "erdfast.experiments.manifold")
