"""A finished (or running) run as the other entry points see it: options, data, averaged network, process."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from erdfast import presets
from erdfast.config import ProcessConfig, TrainConfig
from erdfast.data import Dataset, open_dataset
from erdfast.data.absent import AbsentData
from erdfast.data.dataset import format_classes
from erdfast.models import Backbone, load_published
from erdfast.models.published import SUFFIXES
from erdfast.process import Process
from erdfast.process.coefficients import SPACES
from erdfast.training.checkpoint_files import is_ours, newest_checkpoint, read_model, read_tensors
from erdfast.training.precision import PrecisionPolicy, resolve_precision
from erdfast.training.run_directory import load_run_config
from erdfast.training.setup import build_network, open_data
from erdfast.training.state import PROCESS, PUBLISHED_PROCESS


class PublishedRun(NamedTuple):
    """What `open_run` read."""

    name: str
    """For people: of the network."""
    config: TrainConfig
    """Its options; of a published checkpoint, only what is known."""
    step: int
    """Of the checkpoint that was read; 0 for a published one, which does not say it."""
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
    model, process, step = model.to(device).eval(), process.to(device), int(checkpoint.name)
    return PublishedRun(config.model, config, step, dataset, model, process, policy)


def open_published(
    path: Path,
    precision: str,
    device: torch.device,
    *,
    family: str | None = None,
    model: str | None = None,
    schedule: str | None = None,
    target: str | None = None,
    say: Callable[[str], object] = print,
) -> PublishedRun:
    """Anybody's checkpoint as if it were a run of ours.

    Args:
        path: a file that `load_published` reads.
        precision, device: see `open_run`.
        family: of the checkpoint, where its names do not tell it.
        model: a preset, where its shapes do not tell it.
        schedule, target: of its training, where its family does not tell it.
        say: is told what was found.

    Raises:
        ValueError: it is none, it is of a run of ours, or its schedule or target is not known.
        FileNotFoundError: no such file.
    """
    if (run := _run_of(path)) is not None:  # whose network, process and conventions the run knows, and nobody else
        raise ValueError(
            f"{path} belongs to the run {run}: give the folder as --run, averages of other widths as --weights"
        )
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path} is not a run directory, and as a checkpoint neither .safetensors nor .pt, .pth or .ckpt"
        )
    if path.suffix == ".safetensors" and is_ours(path):
        raise ValueError(
            f"{path} holds weights of a run of erdfast, not how they were trained: give the run's folder as --run, and "
            "this file, if it is an average of another width, as --weights"
        )
    policy = resolve_precision(precision, device)
    preset = None if model is None else presets.model_config(model)
    published = load_published(path, family=family, config=preset)
    said = {name: value for name, value in (("schedule", schedule), ("target", target)) if value is not None}
    options: dict[str, Any] = {"weighting": "constant"} | published.process | said
    unknown = [f"--{name}" for name in ("schedule", "target") if name not in options]
    if unknown:
        raise ValueError(f"{path} does not say how it was trained: add {' and '.join(unknown)}")
    process = ProcessConfig(**options)
    built = process.build().to(device)
    if process.learnable:
        choice = ", ".join(SPACES)
        raise ValueError(f"target {process.target} is learnt, and {path} does not hold what was: choose from {choice}")
    for phrase in published.found:
        say(phrase)
    say(f"sampled as {process.target} prediction on the schedule {process.schedule}")
    network = published.model
    dataset = AbsentData(network.input_shape, network.num_classes)
    config = TrainConfig(process=process)
    return PublishedRun(path.stem, config, 0, dataset, network.to(device), built, policy)


def with_data(run: PublishedRun, data: str) -> PublishedRun:
    """The same network with other data, or with some for a published checkpoint, which has none.

    Args:
        run: of either kind.
        data: as erdfast.train takes it. A mixture has the network's classes, and the run's seed.

    Raises:
        ValueError: it cannot be read, or does not suit the network.
    """
    network = run.model
    mixture = data == "mixture" or data.startswith("mixture:")
    dataset = open_dataset(
        data,
        shape=network.input_shape,
        num_classes=network.num_classes if mixture else None,
        seed=run.config.seed,
        latent_scale=run.config.latent_scale,
    )
    if not len(dataset):
        raise ValueError(f"data {data} is empty")
    classes = dataset.num_classes
    if network.num_classes and (classes > network.num_classes or (not classes and network.null_class is None)):
        raise ValueError(f"data {data} has {format_classes(classes)}, and {run.name} is for {network.num_classes:,}")
    return run._replace(dataset=dataset, config=dataclasses.replace(run.config, data=data))


def _run_of(path: Path) -> Path | None:
    """The run directory of ours whose weights a file holds, beside config.json or in checkpoints/N; else None."""
    if not path.match("model*.safetensors"):
        return None
    folders = [path.parent, *path.absolute().parents[2:3]]
    return next((f for f in folders if (f / "config.json").is_file() and (f / "checkpoints").is_dir()), None)


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
