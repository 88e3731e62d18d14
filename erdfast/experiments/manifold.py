"""`python -m erdfast.experiments.manifold --out DIR`: where a learnable target settles on data of known dimension.

On subspaces and tori of intrinsic dimension d in D = 64 dimensions: where k settles, against D/(D+d) of the linear
theory (k-Diff, theorem 3.2), and what a grid of fixed k reaches in the same training. Every cell is a file of its own
in DIR/cells, so that a run that is stopped goes on where it was; results.json, manifold.png, manifold.md sum them up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from erdfast import cli
from erdfast.atomic import write_text
from erdfast.cells import read_cell, run_missing
from erdfast.diagnostics.linear_theory import k_star
from erdfast.training.run_directory import describe_environment

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
    run_missing(run_cell, cells, config.out / "cells", config.workers)
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


if __name__ == "__main__":
    cli.run(main, "erdfast.experiments.manifold")
