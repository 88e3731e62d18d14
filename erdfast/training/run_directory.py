"""Where a run keeps everything: config.json, environment.json, metrics.jsonl, samples/, checkpoints/, summary.png."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
from pathlib import Path

import numpy as np
import torch

import erdfast
from erdfast.atomic import write_text
from erdfast.config import TrainConfig


def create_run_directory(config: TrainConfig, parent: Path = Path("runs")) -> Path:
    """Make the directory of a new run and write config.json and environment.json into it.

    Raises:
        ValueError: `config.out` already holds a run, or cannot be made.
    """
    try:
        run = _next_numbered(parent, config) if config.out is None else _named(config.out)
        save_run_config(run, config)
        write_text(run / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")
    except OSError as error:
        where = parent if config.out is None else config.out
        raise ValueError(f"the run directory {where} cannot be made: {error.strerror or error}") from error
    return run


def _named(path: Path) -> Path:
    if (path / "config.json").exists():
        raise ValueError(f"{path} already holds a run: continue it with --resume {path}, or choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _next_numbered(parent: Path, config: TrainConfig) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    label = re.sub(r"[^A-Za-z0-9_.]+", "-", f"{config.model}-{Path(config.data or 'mixture').name}")
    while True:
        taken = [int(match[1]) for path in parent.iterdir() if (match := re.match(r"(\d+)-", path.name))]
        run = parent / f"{max(taken, default=-1) + 1:03d}-{label}"
        try:
            run.mkdir()
        except FileExistsError:  # another process was faster
            continue
        return run


def save_run_config(run: Path, config: TrainConfig) -> None:
    """Write config.json: at the start, and when a run continues with options that may change (more steps)."""
    write_text(run / "config.json", dataclasses.replace(config, resume=None, dry_run=False).to_json())


def load_run_config(run: Path) -> TrainConfig:
    """The options of an existing run.

    Raises:
        ValueError: there is no readable config.json.
    """
    path = run / "config.json"
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"{run} is not a run directory: {path}: {error.strerror or error}") from error
    return TrainConfig.from_json(text, str(path))


def describe_environment() -> dict[str, str]:
    """Versions and hardware, for the record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "erdfast": erdfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": device,
        "threads": str(torch.get_num_threads()),
    }
