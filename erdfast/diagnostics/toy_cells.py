"""One training of the toy and all that is measured on it: a cell, which is a function of its settings alone."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from . import toy_measures
from .toy_data import Task
from .toy_training import ToyNetwork, ToyTraining


@dataclass(frozen=True, kw_only=True)
class ToyCell:
    """What is trained, and on how many points it is measured."""

    process: str
    """flow, vp or gvp."""
    target: str
    """eps, x0, v or u."""
    part: int | None
    """A time bin 0..4, or None: all times."""
    seed: int
    """Of data, noise, times and weights."""
    iterations: int
    """Optimiser steps on fresh samples."""
    time_scale: float
    """Factor of the time before its sines and cosines."""
    per_mode: int
    """Held-out points of each mode for errors, phases and features."""
    kernel_per_mode: int
    """Points of each mode for eigenvalues of the tangent kernel."""
    gram_per_mode: int
    """Points of each mode for Gram matrices and for the coupling of times."""
    batch: int = 512
    """Samples of a step."""

    @property
    def name(self) -> str:
        """Of its file."""
        part = "all" if self.part is None else f"bin{self.part}"
        sizes = f"{self.iterations}x{self.batch}-scale{self.time_scale:g}"
        return f"{self.process}-{self.target}-{part}-{sizes}-seed{self.seed}"


def run_cell(cell: ToyCell) -> dict[str, Any]:
    """Train and measure.

    All times: errors, floors, phases, features, kernels, predictions. A bin: its errors, at the end and as they were
    after a fifth of the iterations, when all bins together had seen as many samples as the network of all times has.
    """
    torch.manual_seed(cell.seed)
    task, network = Task(cell.process, cell.target), ToyNetwork(cell.time_scale)
    interval = toy_measures.bin_interval(cell.part)
    training = ToyTraining(network, task, batch=cell.batch, seed=cell.seed, interval=interval)
    start = copy.deepcopy(network)
    found: dict[str, Any] = dataclasses.asdict(cell)
    if cell.part is not None:
        training.run(cell.iterations // toy_measures.BINS)
        found["early_errors"] = toy_measures.errors(network, task, interval, cell.per_mode, cell.seed)
    training.run(cell.iterations)
    found["errors"] = toy_measures.errors(network, task, interval, cell.per_mode, cell.seed)
    if cell.part is None:
        found["floors"] = toy_measures.floors(task, cell.seed)
        found["phases"] = toy_measures.phases(task, cell.per_mode, cell.seed)
        found["features"] = toy_measures.features(network, task, cell.per_mode, cell.seed)
        found["predictions"] = toy_measures.predictions(network, task, cell.seed)
        points = (cell.kernel_per_mode, cell.seed, cell.gram_per_mode)
        found["kernels"] = toy_measures.kernels(network, start, task, *points)
    return found


def check_result(found: dict[str, Any]) -> None:
    """Raise KeyError where something that is drawn is missing."""
    parts = ("floors", "phases", "features", "predictions", "kernels") if found["part"] is None else ("early_errors",)
    for name in ("errors", *parts):
        found[name]
