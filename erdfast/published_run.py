"""A finished (or running) run as the other entry points see it: options, data, averaged network, process."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erdfast.config import TrainConfig
from erdfast.data import Dataset
from erdfast.models import Backbone
from erdfast.process import Process
from erdfast.training.checkpoint_files import newest_checkpoint, read_model, read_tensors
from erdfast.training.precision import PrecisionPolicy, resolve_precision
from erdfast.training.run_directory import load_run_config
from erdfast.training.setup import build_network, open_data
from erdfast.training.state import PROCESS, PUBLISHED_PROCESS


class PublishedRun(NamedTuple):
    """What `open_run` read."""

    config: TrainConfig
    step: int
    """Of the checkpoint that was read."""
    dataset: Dataset
    model: Backbone
    """With averaged weights, in evaluation mode."""
    process: Process
    """With the averaged learnable target."""
    precision: PrecisionPolicy


def open_run(run: Path, precision: str, device: torch.device, weights: Path | None = None) -> PublishedRun:
    """Read the newest complete checkpoint of a run directory.

    Args:
        run: the directory.
        precision: of the network; not fp8.
        device: where it shall be.
        weights: averaged weights of `python -m erdfast.ema` in place of the checkpoint's.

    Raises:
        ValueError: it is no run directory, has no complete checkpoint, or its data is gone (names the file); or
            precision fp8.
    """
    # The back end of training may be missing here, and its choice is not what was trained.
    config = dataclasses.replace(load_run_config(run), attention="auto")
    if precision == "fp8":
        raise ValueError("precision fp8 is for training; choose auto, fp32, bf16 or fp16 for its samples")
    policy = resolve_precision(precision, device)
    checkpoint = newest_checkpoint(run)
    dataset = open_data(config)
    model = build_network(config, dataset)
    process = config.process.build()
    try:
        model.load_state_dict(read_model(checkpoint))
        process.load_state_dict(_averaged_process(checkpoint, process))
        if weights is not None:
            checkpoint = _load_weights(weights, model, process, checkpoint)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")  # PyTorch lists every name
        raise ValueError(f"{weights or checkpoint} does not fit {run / 'config.json'}: {reason}") from error
    return PublishedRun(config, int(checkpoint.name), dataset, model.to(device).eval(), process.to(device), policy)


def _load_weights(path: Path, model: Backbone, process: Process, checkpoint: Path) -> Path:
    """Load a file of `python -m erdfast.ema`; gives the checkpoint's path, named by that average's step."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--weights {path} cannot be read: {error}") from error
    own = {name: value for name, value in tensors.items() if not name.startswith(PROCESS)}
    model.load_state_dict(own)
    learnt = {name.removeprefix(PROCESS): value for name, value in tensors.items() if name.startswith(PROCESS)}
    process.load_state_dict(process.state_dict() | learnt)
    return checkpoint.with_name(notes.get("step", checkpoint.name))


def _averaged_process(checkpoint: Path, process: Process) -> dict[str, Tensor]:
    """The averaged target, in the shapes that the process has: single numbers are saved as vectors of one."""
    learnt = read_tensors(checkpoint, PUBLISHED_PROCESS) or read_tensors(
        checkpoint, "ema/process/"
    )  # the latter: format 1
    shapes = {name: value.shape for name, value in process.state_dict().items()}
    return {name: value.reshape(shapes.get(name, value.shape)) for name, value in learnt.items()}
