"""Where a run keeps everything: config.json, environment.json, metrics.jsonl, samples/, checkpoints/, summary.png."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
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
    for name in ("config.json", "checkpoints", "metrics.jsonl", "model.safetensors"):
        if (path / name).exists():
            raise ValueError(
                f"{path} already holds a run ({name}): continue it with --resume {path}, or choose another --out"
            )
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
    own = dataclasses.replace(config, resume=None, dry_run=False, gpus=0, device=TrainConfig.device)
    write_text(run / "config.json", own.to_json())


def load_run_config(run: Path) -> TrainConfig:
    """The options of an existing run.

    Raises:
        ValueError: there is no readable config.json.
    """
    path = run / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{run} is not a run directory: {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} does not hold the options of a training run ({error})") from error
    return TrainConfig.from_json(text, str(path))


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Keep other processes from training in this directory; the system releases the lock even after a kill.

    Raises:
        ValueError: another process trains there.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix: no such lock
        yield
        return
    handle = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{run} is being trained by another process") from error
        yield
    finally:
        os.close(handle)


def describe_environment() -> dict[str, str]:
    """Versions, hardware and the command line, for the record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "erdfast": erdfast.__version__,
        "commit": _commit(),
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": str(torch.version.cuda),
        "numpy": np.__version__,
        "device": device,
        "processes": os.environ.get("WORLD_SIZE", "1"),
        "threads": str(torch.get_num_threads()),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of the checkout that this package runs from; "unknown" where it is installed."""
    here = Path(erdfast.__file__).parent
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"
