"""`python -m erdfast.evaluate`: measure samples against a reference, or a run on digits.

    --samples S.npz [S2.npz ...] --reference R.npz --inception W.pth    FID, sFID, Inception score, precision, recall
    --samples F.npy --reference G.npy --metrics fd [precision recall]   the same of features of any network
    --samples S.npz --reference digits                                  digits: pixels as features, label accuracy
    --reference F --inception W.pth --save-reference R.npz              statistics of pictures, to compare with later
    --run RUN                                                           digits: distance in pixel space, label accuracy

Under torchrun the processes share the pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from erdfast import cli
from erdfast.atomic import write_text
from erdfast.config import EvaluateConfig, SamplePrecision
from erdfast.evaluation.comparison import Row, axis_of, format_table, save_plot, save_record
from erdfast.evaluation.digits import digits_report
from erdfast.evaluation.features import Progress
from erdfast.evaluation.inception_weights import SOURCE
from erdfast.evaluation.measure import KINDS, check_metrics
from erdfast.evaluation.measurement import Measurement
from erdfast.published_run import open_run
from erdfast.sampling import sample
from erdfast.tensor_files import checksum
from erdfast.training.parallel import World, open_world

PICTURES_PER_CALL = {"cuda": 256, "cpu": 32}
"""By default. The first convolutions take 6 MB a picture; larger batches are no faster."""
DIGITS = Path("digits")
_OF_RUNS = ("steps", "seed", "precision", "weights")
_OF_SAMPLES = ("reference", "inception", "x", "x_label", "out", "save_reference", "metrics")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure files of samples against a reference (--samples), or a run on digits (--run)."""

    samples: tuple[Path, ...] = ()
    """npz files of ADM: uint8 NHWC pictures `arr_0`; several give a comparison. With --metrics fd, files or folders of
    features: .npy, or .npz and .safetensors with `features`."""
    reference: Path | None = None
    """npz of ADM (mu, sigma, mu_s, sigma_s, arr_0), or of pictures, or that --save-reference wrote, or a folder of
    erdfast.prepare; for fd features; "digits": the real ones of scikit-learn by their pixels, without --inception."""
    inception: Path | None = None
    """Weights of the FID Inception network, pt_inception-2015-12-05-6726825d.pth; nothing is downloaded."""
    metrics: tuple[str, ...] = ()
    """Of pictures out of fid, sfid, is, precision, recall, by default all. Of features fd, if need be with precision
    and recall. Of digits fd, precision, recall, accuracy, by default all."""
    x: tuple[float, ...] = ()
    """A number for each file of samples, such as its guidance; by default the one in which file names differ."""
    x_label: str | None = None
    """What --x is."""
    out: Path | None = None
    """JSON file to write; by default SAMPLES.metrics.json beside the first. Several samples also give its .png."""
    save_reference: Path | None = None
    """Write the reference's statistics and features to this npz, which is much faster to compare with; without
    --samples this is all that is done."""
    batch_size: int | None = None
    """Images per network call and process; by default 600 for digits, 256 for Inception on a GPU, 32 on a CPU."""
    run: Path | None = None
    """Run directory of erdfast.train, trained on digits."""
    steps: int = 18
    """Steps of the sampler (--run)."""
    seed: int = 1
    """Seed of the samples (--run)."""
    precision: SamplePrecision = "auto"
    """Of the run's network (fp8 is for training alone); the sampler's state is float32."""
    weights: Path | None = None
    """With --run, averaged weights in place of the newest checkpoint's: a file that `python -m erdfast.ema` made."""

    @property
    def kind(self) -> str:
        """What is measured: a name of KINDS."""
        if self.reference == DIGITS:
            return "digits"
        return "features" if "fd" in self.metrics else "pictures"

    @property
    def asked(self) -> tuple[str, ...]:
        """The metrics, those by default included."""
        return self.metrics or KINDS[self.kind]

    @property
    def record(self) -> Path:
        """The JSON file. Names keep their dots: 35 in cfg1.35 is no suffix."""
        first = self.samples[0]
        return self.out or first.with_name(f"{first.name if first.is_dir() else first.stem}.metrics.json")

    @property
    def only_saves(self) -> bool:
        """Whether a reference is saved and nothing compared with it."""
        return not self.samples and self.run is None and self.save_reference is not None

    def validate(self) -> None:
        """Raise ValueError for options that do not go together."""
        if (self.run is None) == (not self.samples) and not self.only_saves:
            raise ValueError("choose one of --samples FILE ... (against --reference) and --run RUN (trained on digits)")
        for name in _OF_SAMPLES if self.run else _OF_RUNS:
            if getattr(self, name) != getattr(Evaluate(), name):
                mode = "--samples" if self.run else "--run"
                raise ValueError(f"--{name.replace('_', '-')} goes with {mode} only")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.only_saves and (self.out is not None or self.x or self.x_label is not None):
            raise ValueError("--out, --x and --x-label go with --samples FILE ..., which are not given")
        if self.samples or self.only_saves:
            self._validate_samples()

    def _validate_samples(self) -> None:
        check_metrics(self.asked, self.kind)
        if self.reference is None and self.metrics != ("is",):
            raise ValueError(f"--reference is missing: {', '.join(self.asked)} compare with a reference npz")
        if self.kind != "pictures":
            if self.inception is not None or self.save_reference is not None:
                what = "--metrics fd takes features" if self.kind == "features" else "--reference digits takes pixels"
                raise ValueError(f"{what} as they are: leave out --inception and --save-reference")
        elif self.inception is None:
            raise ValueError(f"--inception is missing: name the weights of the FID Inception network. {SOURCE}")
        for name, path, suffix in (("out", self.out, ".json"), ("save-reference", self.save_reference, ".npz")):
            if path is not None and (path.suffix != suffix or path.is_dir()):
                raise ValueError(f"--{name} {path} must be a file that ends in {suffix}")
        if self.save_reference is not None and self.reference is None:
            raise ValueError("--save-reference saves what --reference gave: name one")
        if self.save_reference is not None and self.save_reference in (self.reference, *self.samples):
            raise ValueError(f"--save-reference {self.save_reference} would replace what is measured")
        written = {"out": self.record} if self.samples else {}
        written |= {"save-reference": self.save_reference} if self.save_reference is not None else {}
        for name, path in written.items():
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise ValueError(f"--{name} {path}: {path.parent} is no folder that can be written to")
        axis_of(self.samples, self.x, self.x_label)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print and write; returns the exit code."""
    options = cli.parse(Evaluate, argv)
    options.validate()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.run is not None:
        _evaluate_run(_run_config(options, options.run), device)
        return 0
    with open_world(device) as world:
        _evaluate_samples(options, world)
    return 0


# ---------------------------------------------------------------------- files of samples


def _evaluate_samples(options: Evaluate, world: World) -> None:
    measurement = Measurement(
        batch_size=options.batch_size or PICTURES_PER_CALL[world.device.type],
        device=world.device,
        group=world,
        progress=_bars(world),
        warn=lambda line: _warn(world, line),
    )
    notes: dict[str, object] = {"reference": None if options.reference is None else str(options.reference)}
    if options.kind == "digits":
        rows = measurement.digits(options.samples, options.asked)
    elif options.inception is None:
        assert options.reference is not None
        rows = measurement.features(options.samples, options.reference, options.asked)
    else:
        rows = measurement.pictures(
            options.samples, options.reference, options.inception, options.asked, options.save_reference
        )
        notes |= {"inception": str(options.inception), "inception_crc32": f"{checksum(options.inception):08x}"}
    if world.is_main and options.only_saves:
        print(f"written: {options.save_reference}")
    elif world.is_main:
        _report(options, rows, notes)


def _report(options: Evaluate, rows: Sequence[Row], notes: dict[str, object]) -> None:
    axis = axis_of(options.samples, options.x, options.x_label)
    written = [options.record]
    print(format_table(rows, axis))
    if len(rows) > 1:
        print("* the best")
    save_record(written[0], rows, axis, notes)
    if len(rows) > 1:
        written.append(written[0].with_suffix(".png"))
        save_plot(written[1], rows, axis)
    print(f"written: {', '.join(map(str, written))}")


def _bars(world: World):
    @contextlib.contextmanager
    def open_bar(what: str, total: int) -> Iterator[Progress]:
        with tqdm(total=total, unit="image", desc=what, dynamic_ncols=True, disable=not world.is_main) as bar:
            yield lambda more: bar.update(min(more, total - bar.n))

    return open_bar


def _warn(world: World, line: str) -> None:
    if world.is_main:
        print(f"warning: {line}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- runs on digits


def _run_config(options: Evaluate, run: Path) -> EvaluateConfig:
    config = EvaluateConfig(run=run, **{name: getattr(options, name) for name in _OF_RUNS})
    if options.batch_size is not None:
        config = dataclasses.replace(config, batch_size=options.batch_size)
    config.validate()
    return config


def _evaluate_run(config: EvaluateConfig, device: torch.device) -> None:
    run = open_run(config.run, config.precision, device, config.weights)
    if run.config.data != "digits":
        raise ValueError(
            f"{config.run} was trained on {run.config.data}; only runs on digits can be evaluated by themselves: "
            "draw samples with erdfast.sample and name them with --samples"
        )

    def draw(labels: Tensor, cfg_scale: float) -> Tensor:
        return sample(
            run.model,
            run.process,
            num=len(labels),
            labels=labels,
            cfg_scale=cfg_scale,
            steps=config.steps,
            seed=config.seed,
            batch_size=config.batch_size,
            autocast_dtype=run.precision.autocast_dtype,
        )

    report = digits_report(draw)
    result = {"step": run.step, "sampler_steps": config.steps, "seed": config.seed, **dataclasses.asdict(report)}
    write_text(config.run / "evaluation.json", json.dumps(result, indent=2) + "\n")
    print(
        f"label accuracy {100 * report.label_accuracy:.1f}% "
        f"({report.num_guided} samples, guidance {report.cfg_scale:g}); "
        f"Frechet distance {report.frechet_distance:.3f} ({report.num_unguided:,} samples; "
        f"two halves of the real digits: {report.frechet_distance_real_halves:.3f})"
    )


if __name__ == "__main__":
    cli.run(main, "erdfast.evaluate")
