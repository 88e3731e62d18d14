"""Checkpoints that are complete or absent, hold tensors as safetensors and numbers as JSON, and are never unpickled.

    checkpoints/00001000/
        model.safetensors   averaged weights under the published names: for everyone else
        state.safetensors   weights, optimiser moments, learnable targets
        state.json          step, loss scale, version of the format

A checkpoint is written under a temporary name, flushed to the disk, and renamed: a crash at any moment leaves the older
checkpoints whole, and a folder without the temporary name is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_FILES = ("model.safetensors", "state.safetensors", "state.json")


class Checkpoint(NamedTuple):
    """What `load_checkpoint` read."""

    step: int
    """Optimiser steps done."""
    tensors: dict[str, Tensor]
    """Contents of state.safetensors, on the CPU."""
    model: dict[str, Tensor]
    """Averaged weights, on the CPU."""
    numbers: dict[str, Any]
    """Contents of state.json."""


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write `folder/<step>` and then remove all but the newest `keep_last`.

    Raises:
        OSError: it cannot be written; nothing of it remains, and older checkpoints are untouched.
    """
    target, temporary = folder / f"{step:08d}", _temporary(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.partial"):  # by a crash
        shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir()
        _save_tensors(temporary / "model.safetensors", model)
        _save_tensors(temporary / "state.safetensors", tensors)
        content = json.dumps({"format": FORMAT, "step": step, **numbers}, indent=2) + "\n"
        (temporary / "state.json").write_text(content)
        for name in _FILES:
            _sync(temporary / name)
        _sync(temporary)
        if target.exists():  # damaged: a complete one would have been resumed from
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in complete_checkpoints(folder)[:-keep_last]:
        if old != target:
            _remove(old)
    return target


def _remove(checkpoint: Path) -> None:
    """Under a temporary name first, so that a crash leaves no half of it under its own."""
    doomed = _temporary(checkpoint.parent, int(checkpoint.name))
    with contextlib.suppress(OSError):  # one checkpoint too many does no harm
        checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _temporary(folder: Path, step: int) -> Path:
    return folder / f".{step:08d}.partial"


def checkpoint_path(run: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of a step."""
    return run / "checkpoints" / f"{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [
        path for path in folder.glob("[0-9]*") if path.name.isdigit() and all((path / f).is_file() for f in _FILES)
    ]
    return sorted(found, key=lambda path: int(path.name))


def load_checkpoint(path: Path, prefix: str = "") -> Checkpoint:
    """Read one checkpoint folder.

    Args:
        path: the folder.
        prefix: of state.safetensors, read only the tensors whose names begin so: sampling needs no optimiser.

    Raises:
        ValueError: it is damaged or of another format; names the file.
    """
    try:
        numbers = json.loads((path / "state.json").read_text())
        with safe_open(path / "state.safetensors", framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys() if name.startswith(prefix)}  # noqa: SIM118
        model = load_file(path / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read: {error}; remove that folder to continue from an older one"
        ) from error
    if not isinstance(numbers, dict) or numbers.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path} is not of format {FORMAT}: {path / 'state.json'}")
    step = numbers.get("step")
    if not isinstance(step, int) or step != int(path.name):
        raise ValueError(f"checkpoint {path} says that it is of step {step!r}: {path / 'state.json'}")
    return Checkpoint(step, tensors, model, numbers)


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run directory.

    Raises:
        ValueError: there is none.
    """
    found = complete_checkpoints(run / "checkpoints")
    if not found:
        raise ValueError(f"{run} holds no complete checkpoint (looked in {run / 'checkpoints'})")
    return found[-1]


def publish(checkpoint: Path, run: Path) -> Path:
    """Put a checkpoint's averaged weights at the top of the run directory, atomically."""
    target, temporary = run / "model.safetensors", run / ".model.safetensors.partial"
    try:
        shutil.copyfile(checkpoint / "model.safetensors", temporary)
        _sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        # One key only: safetensors writes several in random order, and equal runs shall leave equal files.
        save_file(contiguous, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner can read
    except SafetensorError as error:  # safetensors hides a full disk in an error of its own
        raise OSError(f"cannot write {path}: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
