"""Snapshots of power-function averages, RUN/ema/<step>-<average>.safetensors, and averages made of them afterwards.

A snapshot holds the trained parameters by the names they have in a `DiffusionStep`, float32, and its step, relative
width and checksum as metadata. Karras et al. 2024 (EDM2), sec. 3.2: an average of any width is a combination of
snapshots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erdfast.tensor_files import replace_tensors, tensors_checksum

from .power import LARGEST_STD, LEAST_STD, coefficients, mismatch

FOLDER = "ema"
STEP, STD, CRC = "step", "std", "crc32"
"""Notes in the header of a snapshot; the first two also in that of an average made of snapshots."""


@dataclass(frozen=True, order=True)
class Snapshot:
    """One file."""

    step: int
    """Optimiser steps that the average has seen."""
    std: float
    """Relative width of its profile."""
    path: Path


def snapshot_path(run: Path, step: int, name: str) -> Path:
    """Where the average `name` ("std0.050") of a step lies."""
    return run / FOLDER / f"{step:08d}-{name}.safetensors"


def write_snapshot(path: Path, tensors: Mapping[str, Tensor], step: int, std: float) -> None:
    """Write one average; complete or absent. What a process that was killed has left beside it is removed.

    Raises:
        OSError: it cannot be written; nothing remains.
    """
    for left in path.parent.glob(".*.safetensors.*.partial"):
        left.unlink(missing_ok=True)
    on_cpu = {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
    replace_tensors(path, on_cpu, {STEP: str(step), STD: repr(std), CRC: str(tensors_checksum(on_cpu))})


def list_snapshots(run: Path) -> list[Snapshot]:
    """All snapshots of a run in order of step and width.

    Raises:
        ValueError: a file is damaged or none of ours, or its step or width cannot be; names it.
    """
    return sorted(_describe(path) for path in sorted((run / FOLDER).glob("*.safetensors")))


def _describe(path: Path) -> Snapshot:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        step, std = int(about[STEP]), float(about[STD])
        if not 1 <= step < 2**32:
            raise ValueError(f"its step is {step}; it must be at least 1 and below 2^32")
        if not LEAST_STD <= std <= LARGEST_STD:
            raise ValueError(f"its width is {std}; it must be in [{LEAST_STD}, {LARGEST_STD}]")
    except KeyError as error:
        raise ValueError(f"{path} is no snapshot of an average: no {error} in its header; delete or move it") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no snapshot of an average: {error}; delete or move it") from error
    return Snapshot(step, std, path)


@dataclass(frozen=True)
class Combination:
    """Which snapshots make an average, and how well."""

    snapshots: list[Snapshot]
    weights: np.ndarray
    error: float
    """Distance between the profile that they make and the wanted one, relative to the latter's norm."""


def combine(snapshots: Sequence[Snapshot], step: int, std: float) -> Combination:
    """The best combination of the snapshots up to `step` for the average of width `std` there.

    Raises:
        ValueError: there are none, or `std` is out of range.
    """
    usable = [snapshot for snapshot in snapshots if snapshot.step <= step]
    if not usable:
        raise ValueError(f"no snapshot is from step {step:,} or before")
    times, stds = [s.step for s in usable], [s.std for s in usable]
    weights = coefficients(times, stds, step, std)
    return Combination(usable, weights, mismatch(times, stds, weights, step, std))


def reconstruct(combination: Combination) -> dict[str, Tensor]:
    """The average by parameter, float32; summed in float64, one file in memory at a time.

    Raises:
        ValueError: a file is damaged or of another network; names it.
    """
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(combination.snapshots, combination.weights.tolist(), strict=True):
        tensors = _read(snapshot.path)
        if total and _shapes(tensors) != _shapes(total):
            raise ValueError(f"{snapshot.path} holds other parameters than {combination.snapshots[0].path}")
        for name, tensor in tensors.items():
            total[name] = total[name].add_(tensor, alpha=weight) if name in total else tensor.mul_(weight)
    return {name: tensor.to(torch.float32) for name, tensor in total.items()}


def _read(path: Path) -> dict[str, Tensor]:
    """Float64."""
    try:
        with safe_open(path, framework="pt") as file:
            wanted = (file.metadata() or {}).get(CRC)  # older snapshots have none
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if wanted is not None and wanted != str(tensors_checksum(tensors)):
        raise ValueError(f"{path} is damaged: it does not have the checksum that it was written with")
    return {name: tensor.double() for name, tensor in tensors.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
