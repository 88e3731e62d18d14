"""`python -m erdfast.ema`: averages of another width, made of a run's snapshots after training (EDM2, sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from erdfast import cli
from erdfast.config import EmaReconstruction
from erdfast.published_run import open_run
from erdfast.tensor_files import replace_tensors
from erdfast.training.checkpoint_files import OURS
from erdfast.training.snapshots import FOLDER, STD, STEP, Combination, Snapshot, combine, list_snapshots, reconstruct
from erdfast.training.state import MODEL, PROCESS

GOOD, BAD = 0.05, 0.2
"""Relative distances of the profiles above which a warning is due, and above which nothing is written: the average of
width 0.1, scaled to fit best, is 0.18 from that of 0.08 (training/power.py). What is farther off has another width."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, list or reconstruct; returns the exit code."""
    config = cli.parse(EmaReconstruction, argv, program="erdfast.ema")
    config.validate()
    snapshots = list_snapshots(config.run)
    if not snapshots:
        raise ValueError(f"{config.run / FOLDER} holds no snapshots: train with --ema-std 0.05 0.1")
    if config.std is None:
        _print_list(snapshots)
        return 0
    step = config.step or snapshots[-1].step
    out = config.out or config.run / f"model-std{config.std}-step{step:08d}.safetensors"
    _refuse_others(out, config.run)
    combination = combine(snapshots, step, config.std)
    _report(combination, step, config.std)
    _write(out, config.run, combination, step, config.std)
    print(f"written: {out}; python -m erdfast.sample --run {config.run} --weights {out}")
    return 0


def _refuse_others(out: Path, run: Path) -> None:
    """Raise ValueError unless the file may be written: there is none yet, or one that was written here."""
    if out.parent.resolve() == (run / FOLDER).resolve():
        raise ValueError(f"--out {out} lies among the snapshots of {run}; choose another folder")
    if not out.exists():
        return
    try:
        with safe_open(out, framework="pt") as file:
            notes, names = file.metadata() or {}, list(file.keys())
        # Snapshots have these notes too, and the names of a training step.
        ours = {STEP, STD} <= notes.keys() and not any(name.startswith(MODEL) for name in names)
    except (OSError, SafetensorError):
        ours = False
    if not ours:
        raise ValueError(
            f"{out} was not written by erdfast.ema and is not replaced; choose another --out, or remove it"
        )


def _print_list(snapshots: Sequence[Snapshot]) -> None:
    for std in sorted({snapshot.std for snapshot in snapshots}):
        steps = [snapshot.step for snapshot in snapshots if snapshot.std == std]
        print(f"width {std:g}: {len(steps)} snapshots, steps {steps[0]:,} to {steps[-1]:,}")
    print("--std WIDTH makes an average of another width")


def _report(combination: Combination, step: int, std: float) -> None:
    """Say how well it can be done.

    Raises:
        ValueError: it cannot.
    """
    low, high = combination.weights.min(), combination.weights.max()
    text = (
        f"width {std:g} at step {step:,} from {len(combination.snapshots)} snapshots: weights {low:.3g} to {high:.3g}, "
        f"the profile within {combination.error:.2%}"
    )
    if combination.error > BAD:
        raise ValueError(f"{text}: too far off; choose a width or a step nearer to those of the snapshots")
    print(text + (": a poor match, nearer to the snapshots is better" if combination.error > GOOD else ""))


def _write(out: Path, run: Path, combination: Combination, step: int, std: float) -> None:
    """The averaged network under the published names, and a learnt target as "process.*"."""
    opened = open_run(run, "fp32", torch.device("cpu"))
    known = opened.model.state_dict()
    made = reconstruct(combination)
    tensors = {name.removeprefix(MODEL): value for name, value in made.items() if name.startswith(MODEL)}
    if unknown := [name for name in tensors if name not in known]:
        raise ValueError(f"{combination.snapshots[0].path} holds {unknown[0]}, which the network of {run} has not")
    tensors = {name: value.clone() for name, value in known.items()} | tensors
    tensors |= {name: value for name, value in made.items() if name.startswith(PROCESS)}
    replace_tensors(out, tensors, {STEP: str(step), STD: repr(std), **OURS})


if __name__ == "__main__":
    cli.run(main, "erdfast.ema")
