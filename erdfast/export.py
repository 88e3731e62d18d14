"""`python -m erdfast.export`: a run's averaged weights as a folder that diffusers' DiTTransformer2DModel loads.

What diffusers has no place for is in its erdfast_process.json: how noise was added and what is predicted, as options
of erdfast.process.Process and as a table of noise levels; a configuration of diffusers' scheduler that fits, where
there is one; and the line that makes the loaded network compute as it was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erdfast import cli
from erdfast.models import DiT
from erdfast.models.diffusers_dit import PROCESS, check_replaceable, save_diffusers
from erdfast.process import Process
from erdfast.process.schedule import DiscreteSchedule
from erdfast.published_run import PublishedRun, open_run

LEVELS = 1001
"""Rows of the table of a continuous schedule."""

AFTER_LOADING = "for block in transformer.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0"
"""`use_published_frequencies` for those who have diffusers alone."""

_PREDICTIONS = {"x0": "sample", "eps": "epsilon", "v": "v_prediction"}
"""Targets by diffusers' names."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run's averaged weights as a folder for diffusers (networks: dit)."""

    run: Path
    """Run directory of erdfast.train."""
    out: Path
    """Folder to write: new, empty, or written by this command before."""
    weights: Path | None = None
    """Averaged weights in place of the newest checkpoint's: a file that `python -m erdfast.ema` made."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, read, write; returns the exit code."""
    config = cli.parse(ExportConfig, argv)
    check_replaceable(config.out)
    run = open_run(config.run, "fp32", torch.device("cpu"), config.weights)
    if not isinstance(run.model, DiT):
        name = run.model.config.backbone
        raise ValueError(f"{config.run} trained {run.config.model}, a {name}; diffusers has a counterpart of dit alone")
    save_diffusers(run.model, config.out, process_notes(run))
    low, high = run.process.schedule.network_time_range
    print(
        f"written: {config.out} ({run.config.model}, step {run.step:,}) for diffusers' DiTTransformer2DModel; it "
        f"predicts {run.process.target_name} on the schedule {run.config.process.schedule}, timestep {low:g} to "
        f"{high:g}, see {PROCESS}; after loading it call erdfast.models.use_published_frequencies(transformer)"
    )
    return 0


def process_notes(run: PublishedRun) -> dict[str, Any]:
    """The fields of erdfast_process.json.

    levels: columns of numbers, one row per noise level. The network gets `timestep` and x_t = alpha*x0 + sigma*eps, eps
        standard normal, and predicts c_x*x0 + c_eps*eps; with learn_sigma in the first half of its channels.
    scheduler: for `from_config` of the class that it names, or null where none fits. The network takes the scheduler's
        timesteps times `timestep_factor`.
    null_class: the label of classifier-free guidance, or null if it was not trained.
    """
    return {
        "model": run.config.model,
        "step": run.step,
        "process": run.process.describe(),
        "levels": _levels(run.process),
        "scheduler": _scheduler(run.process),
        "timestep_factor": _timestep_factor(run.process),
        "null_class": run.model.null_class,
        "after_loading": AFTER_LOADING,
    }


@torch.no_grad()
def _levels(process: Process) -> dict[str, list[float]]:
    steps = process.schedule.num_timesteps
    times = torch.linspace(0, 1, LEVELS, dtype=torch.float64) if steps is None else torch.arange(steps)
    found = process.coefficients(times, torch.float64)
    columns = {
        "timestep": found.time,
        "alpha": found.alpha,
        "sigma": found.sigma,
        "c_x": found.c_x,
        "c_eps": found.c_eps,
    }
    return {name: column.tolist() for name, column in columns.items()}


def _scheduler(process: Process) -> dict[str, Any] | None:
    """The scheduler of diffusers that takes the network's prediction as it is, if there is one."""
    if process.noise_scale != 1:
        return None
    schedule, target = process.schedule, process.target_name
    if isinstance(schedule, DiscreteSchedule) and target in _PREDICTIONS:
        return {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": schedule.num_timesteps,
            "trained_betas": schedule.betas(schedule.num_timesteps).tolist(),
            "prediction_type": _PREDICTIONS[target],
            "clip_sample": False,
        }
    if process.describe()["schedule"] == "flow" and target == "u":
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    return None


def _timestep_factor(process: Process) -> float:
    """Schedulers of discrete processes count steps, that of flow matching thousandths; see `Schedule.network_time`."""
    steps = process.schedule.num_timesteps
    return 0.001 if steps is None else 1000 / steps


if __name__ == "__main__":
    cli.run(main, "erdfast.export")
