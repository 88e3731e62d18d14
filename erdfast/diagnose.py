"""`python -m erdfast.diagnose`: what noise levels do to training, in figures, numbers and one page.

    mixture --out DIR                  the ERD paper's toy: four targets, three processes, against closed forms
    targets --out DIR [--data D]       how predictable eps, x0, v, u, score and k are from x_t, by noise level
    dimension --out DIR [--data D]     intrinsic dimension of data, and the learnable target k that it suggests
    run RUN [RUN2 ...] --out DIR       loss, weight, gradients and ranks of trained networks by noise level

Each writes PNG files, the numbers behind each as JSON beside it, index.html, which needs nothing else, and the same as
Markdown.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, Union

import torch
import tyro

from erdfast import cli
from erdfast.config import SamplePrecision
from erdfast.diagnostics.dimension import Dimension, run_dimension
from erdfast.diagnostics.mixture import Mixture, diagnose_mixture
from erdfast.diagnostics.run import QUICK, Settings, diagnose_runs
from erdfast.diagnostics.subject import Subject
from erdfast.diagnostics.targets import Targets, run_targets
from erdfast.published_run import PublishedRun, open_published, open_run, with_data
from erdfast.training.run_directory import describe_environment
from erdfast.typed_json import require

PROGRAM = "erdfast.diagnose"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Loss, weight, gradients and ranks of trained networks by noise level, one curve for each."""

    run: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories of erdfast.train, or published checkpoints (see erdfast.sample), all for one shape of images."""
    out: Path
    """Folder of the page, its figures and numbers."""
    data: str | None = None
    """What to measure on, as for erdfast.train: images that were held out, say. By default each run's own training
    data; published checkpoints have none."""
    num_levels: int = 24
    """Noise levels, equally spaced in log-SNR."""
    num_samples: int = 512
    """Images per level for losses and ranks."""
    grad_samples: int = 64
    """Images per level for gradients, in up to 16 groups."""
    batch_size: int = 64
    """Images per network call, at most."""
    precision: SamplePrecision = "auto"
    """Of the networks (fp8 is for training alone)."""
    seed: int = 0
    """Of images and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    quick: bool = False
    """At most 10 levels, 128 images and 16 for gradients: a first look."""
    family: Literal["dit", "sit", "lightningdit", "jit", "uvit", "adm_unet", "erd"] | None = None
    """Of published checkpoints, where their names do not tell it; as for erdfast.sample."""
    model: str | None = None
    """Of published checkpoints: the preset, where shapes do not tell it."""
    schedule: str | None = None
    """Of published checkpoints: of their training, by default their family's."""
    target: str | None = None
    """Of published checkpoints: what they predict, by default their family's target."""

    @property
    def settings(self) -> Settings:
        """Numbers of levels and samples."""
        own = Settings(self.num_levels, self.num_samples, self.grad_samples, self.batch_size, self.seed)
        return Settings(*map(min, own, QUICK)) if self.quick else own

    def validate(self) -> None:
        """Raise ValueError for a number out of range, or options that do not go together."""
        if not self.run:
            raise ValueError("name one run directory or published checkpoint, or several")
        if len({path.resolve() for path in self.run}) < len(self.run):
            raise ValueError("a run is named twice")
        for name, least in (("num_levels", 2), ("num_samples", 2), ("grad_samples", 2), ("batch_size", 1)):
            require(name, getattr(self, name), least <= getattr(self, name) < 2**20, f"at least {least}, below 2^20")
        require("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2^63")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda is not here; choose auto or cpu")
        for name in ("family", "model", "schedule", "target"):
            if getattr(self, name) is not None and not any(path.is_file() for path in self.run):
                raise ValueError(f"{name} is for published checkpoints: a run knows its own")


def diagnose_run(options: Run, about: Mapping[str, Any]) -> None:
    """Open and measure all."""
    name = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device.replace("auto", "cpu")
    opened = [_open(path, options, torch.device(name)) for path in options.run]
    whole = [Path(os.path.abspath(path)) for path in options.run]  # "." and ".." have names too; links keep theirs
    names = [path.name if path.is_dir() else path.stem for path in whole]
    if len(set(names)) < len(names):
        names = [str(path) for path in options.run]
    subjects = [
        Subject(
            name=name,
            step=run.step,
            model=run.model,
            process=run.process,
            dataset=run.dataset,
            data=str(run.config.data),
            precision=run.precision,
            published=path.is_file(),
            ignores_labels=run.config.label_drop == 1,
        )
        for name, path, run in zip(names, options.run, opened, strict=True)
    ]
    page = diagnose_runs(subjects, options.settings, options.out, about)
    print(f"written: {page}")


def _open(path: Path, options: Run, device: torch.device) -> PublishedRun:
    if not path.is_file():
        run = open_run(path, options.precision, device)
        return run if options.data is None else with_data(run, options.data)
    if options.data is None:
        raise ValueError(f"{path} is a published checkpoint, which has no data of its own: add --data")
    given = {name: getattr(options, name) for name in ("family", "model", "schedule", "target")}
    return with_data(open_published(path, options.precision, device, **given), options.data)


COMMANDS: dict[type, Callable[..., None]] = {
    Mixture: diagnose_mixture,
    Targets: run_targets,
    Dimension: run_dimension,
    Run: diagnose_run,
}
"""What is done with the options of each command, and what it was started as."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, run; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options: Any = cli.parse(Union[tuple(COMMANDS)], arguments, program=PROGRAM)  # type: ignore[arg-type]  # noqa: UP007  # built from a table
    options.validate()
    command = shlex.join(["python", "-m", PROGRAM, *arguments])
    about = {**describe_environment(), "command": command, "date": date.today().isoformat()}
    COMMANDS[type(options)](options, about)
    return 0


if __name__ == "__main__":
    cli.run(main, PROGRAM)
